// Kernels that try csrc/common/ in the emulator, and kernels with the faults that it must find.
#include "common/device.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "racing_kernels.h"

#include <cstdint>

namespace {

using mlr1::emulator::kRacers;
using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::orderly;
using mlr1::emulator::racing;

constexpr unsigned kThreads = 128;

// A pair whose merge keeps the order: the first value seen, and the number of values.
struct First {
  float value;
  unsigned count;
};

First first_of(const First& a, const First& b) { return {a.value, a.count + b.count}; }

struct Sum {
  float operator()(float a, float b) const { return a + b; }
};

// out[block] = sum of the block's part of x, out[blocks + block] = sum of its cluster's.
void reduce(const float* x, float* out) {
  MLR1_SHARED(shared);
  mlr1::cluster_arrive();
  float* const of_rank = reinterpret_cast<float*>(shared);
  const unsigned block = blockIdx.x;
  float of_block = 0;
  for (unsigned round = 0; round < 2; ++round) {
    const float value = x[block * kThreads + threadIdx.x];
    const float sum = mlr1::block_reduce<kThreads>(value, Sum{}, of_rank + 16);
    const First first = mlr1::block_reduce<kThreads>(First{value, 1}, first_of, of_rank + 16);
    if (first.value == x[block * kThreads] && first.count == kThreads) {
      of_block = sum;
    }
  }
  mlr1::cluster_wait();
  const float total = mlr1::cluster_reduce(of_block, Sum{}, of_rank);
  if (threadIdx.x == kThreads - 1) {
    out[block] = of_block;
    out[gridDim.x + block] = total;
  }
}

void turn_round(const float* x, float* out, bool with_barrier) {
  MLR1_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = x[threadIdx.x];
  if (with_barrier) {
    __syncthreads();
  }
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

void reuse_without_barrier(const float* x, float* out) {
  MLR1_SHARED(shared);
  float* const of_warp = reinterpret_cast<float*>(shared);
  float sum = 0;
  for (unsigned round = 0; round < 4; ++round) {
    const float value = mlr1::warp_reduce(x[threadIdx.x] * float(round + 1), Sum{});
    if (threadIdx.x % mlr1::kWarp == 0) {
      of_warp[threadIdx.x / mlr1::kWarp] = value;
    }
    __syncthreads();
    sum += of_warp[threadIdx.x % (kThreads / mlr1::kWarp)];
  }
  out[threadIdx.x] = sum;
}

using Four = mlr1::Vector<float, 4>;

void faulty(std::int64_t fault, const float* x, float* out, std::int64_t count) {
  MLR1_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const unsigned thread = threadIdx.x;
  switch (fault) {
    case 0:  // a barrier in a branch that some threads take
      if (thread < 16) {
        __syncthreads();
      }
      return;
    case 1:  // two barriers that are not one
      if (thread < 16) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      return;
    case 2:  // a shuffle without half of the lanes
      if (thread % 32 < 16) {
        out[thread] = __shfl_xor_sync(mlr1::kAllLanes, x[thread], 1);
      }
      return;
    case 3:
      out[thread] = x[count + (thread == 77)];
      return;
    case 4:
      out[thread == 77 ? count : thread] = x[thread];
      return;
    case 5:
      values[thread * 2] = x[thread];
      return;
    case 6:
      reinterpret_cast<Four*>(out)[0] = *reinterpret_cast<const Four*>(x + 1);
      return;
    case 7:  // shared memory of a block that may have ended
      values[thread] = x[thread];
      mlr1::cluster_sync();
      if (mlr1::cluster_rank() == 1) {
        out[thread] = *mlr1::cluster_shared(values + thread, 0);
      }
      return;
    case 8:  // shared memory of a block that may not have begun
      *mlr1::cluster_shared(values + thread, 1 - mlr1::cluster_rank()) = x[thread];
      mlr1::cluster_sync();
      return;
    case 9:  // half a warp waits for the cluster
      if (thread % 32 < 16) {
        mlr1::cluster_sync();
      }
      return;
    default:
      return;
  }
}

}  // namespace

MLR1_ENTRY const char* run_reduce(const float* x, float* out, std::int64_t blocks,
                                  std::int64_t cluster, std::int64_t order) {
  return message_of([&] {
    launch({static_cast<unsigned>(blocks), 1, 1}, {kThreads, 1, 1}, static_cast<unsigned>(cluster),
           128, order, [&] { reduce(x, out); });
  });
}

MLR1_ENTRY const char* run_turn_round(const float* x, float* out, std::int64_t with_barrier,
                                      std::int64_t order) {
  return message_of([&] {
    launch({}, {kThreads, 1, 1}, 1, kThreads * sizeof(float), order,
           [&] { turn_round(x, out, with_barrier != 0); });
  });
}

MLR1_ENTRY const char* run_reuse_without_barrier(const float* x, float* out, std::int64_t order) {
  return message_of([&] {
    launch({}, {kThreads, 1, 1}, 1, 16, order, [&] { reuse_without_barrier(x, out); });
  });
}

MLR1_ENTRY const char* run_racing(std::int64_t fault, const float* x, float* out,
                                  std::int64_t blocks, std::int64_t cluster, std::int64_t order) {
  return message_of([&] {
    launch({static_cast<unsigned>(blocks), 1, 1}, {kRacers, 1, 1}, static_cast<unsigned>(cluster),
           2 * kRacers * sizeof(float), order, [&] { racing(fault, x, out); });
  });
}

MLR1_ENTRY const char* run_orderly(std::int64_t way, const float* x, float* out, unsigned* marks,
                                   std::int64_t blocks, std::int64_t cluster, std::int64_t order) {
  return message_of([&] {
    launch({static_cast<unsigned>(blocks), 1, 1}, {kRacers, 1, 1}, static_cast<unsigned>(cluster),
           2 * kRacers * sizeof(float), order, [&] { orderly(way, x, out, marks); });
  });
}

MLR1_ENTRY const char* run_faulty(std::int64_t fault, const float* x, float* out,
                                  std::int64_t count, std::int64_t cluster, std::int64_t order) {
  return message_of([&] {
    launch({static_cast<unsigned>(cluster), 1, 1}, {kThreads, 1, 1},
           static_cast<unsigned>(cluster), kThreads * sizeof(float), order,
           [&] { faulty(fault, x, out, count); });
  });
}
