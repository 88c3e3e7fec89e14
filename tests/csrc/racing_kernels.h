// Kernels of 128 threads that give what they should where threads run first things first, by chance,
// and kernels that look like them and give it in every order.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace mlr1::emulator {

constexpr unsigned kRacers = 128;

// In each, thread t gives what it read as out[t of the grid].
inline void racing(std::int64_t fault, const float* x, float* out) {
  MLR1_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const unsigned t = threadIdx.x;
  const unsigned of_grid = blockIdx.x * kRacers + t;
  const unsigned before = t == 0 ? 0 : t - 1;
  const unsigned behind = t == kRacers - 1 ? t : t + 1;
  const bool is_first = cluster_rank() == 0;
  switch (fault) {
    case 0:  // a read of what another thread writes
      values[t] = x[t];
      out[of_grid] = values[before];
      return;
    case 1:  // a write of what another thread reads
      values[t] = x[t];
      __syncthreads();
      out[of_grid] = values[behind];
      values[t] = 0;
      return;
    case 2:  // a shuffle taken for a barrier
      values[t] = x[t];
      __shfl_sync(kAllLanes, t, 0);
      out[of_grid] = values[t ^ 1];
      return;
    case 3:  // a barrier of the warp taken for one of the block
      values[t] = x[t];
      __syncwarp();
      out[of_grid] = values[t < kWarp ? t : t - kWarp];
      return;
    case 4:  // two blocks, or clusters, write one word
      out[t] = x[t];
      return;
    case 5:  // shared memory of another block, which that writes at the time
      values[t] = 0;
      cluster_sync();
      values[t] = x[t];
      out[of_grid] = is_first ? x[t] : *cluster_shared(values + t, 0);
      cluster_sync();
      return;
    case 6:  // a write between the halves of the barrier that is to publish it
      cluster_sync();
      cluster_arrive();
      values[t] = x[t];
      cluster_wait();
      out[of_grid] = *cluster_shared(values + t, 1 - cluster_rank());
      cluster_sync();
      return;
    case 7:  // shared memory of a block that may have ended
      values[t] = x[t];
      cluster_sync();
      out[of_grid] = is_first ? *cluster_shared(values + t, 1) : 0;
      return;
    case 8:  // shared memory of a block that may not have begun
      if (!is_first) {
        *cluster_shared(values + t, 0) = x[t];
      }
      cluster_sync();
      out[of_grid] = is_first ? values[t] : 0;
      return;
    case 9:  // an ordinary access beside atomic ones
      if (t == 0) {
        out[of_grid] = 0;
      }
      atomicMax(reinterpret_cast<unsigned*>(out + blockIdx.x * kRacers), t);
      return;
    case 10:  // a write before a barrier that does not publish it
      values[t] = x[t];
      Machine::get().cluster_arrive(__LINE__, false);
      cluster_wait();
      out[of_grid] = *cluster_shared(values + t, 1 - cluster_rank());
      cluster_sync();
      return;
    default:  // shared memory that no thread wrote
      if (t < 64) {
        values[t] = x[t];
      }
      __syncthreads();
      out[of_grid] = values[t] > 0 ? 1 : 0;
  }
}

// In each, thread t gives x[t ^ 1] as out[t of the grid]; `marks` is one word.
inline void orderly(std::int64_t way, const float* x, float* out, unsigned* marks) {
  MLR1_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const unsigned t = threadIdx.x;
  float* const mine = out + blockIdx.x * kRacers + t;
  switch (way) {
    case 0:  // what lanes of a warp write and write again
      for (unsigned round = 1; round < 4; ++round) {
        values[t] = x[t] * static_cast<float>(round);
        __syncwarp();
        *mine = values[t ^ 1] / static_cast<float>(round);
        __syncwarp();
      }
      return;
    case 1:  // one word that all threads read and each in turn writes
      for (unsigned turn = 0; turn < 4; ++turn) {
        if (t == turn) {
          values[0] = x[turn];
        }
        __syncthreads();
        *mine = t / 2 == turn / 2 && t != turn ? values[0] : t < 4 ? *mine : x[t ^ 1];
        __syncthreads();
      }
      return;
    case 2:  // what others read before a barrier's first half, and one between the halves
      Machine::get().cluster_arrive(__LINE__, false);
      cluster_wait();
      values[t] = x[t];
      __syncthreads();
      *mine = values[t ^ 1];
      cluster_arrive();
      *mine += values[t] - x[t];
      cluster_wait();
      values[t] = 0;
      return;
    case 3:  // what a block writes before a barrier's first half, and another reads behind the second
      cluster_sync();
      values[t] = x[t];
      cluster_arrive();
      values[kRacers + t] = values[t];
      cluster_wait();
      *mine = *cluster_shared(values + (t ^ 1), cluster_size() - 1 - cluster_rank());
      cluster_sync();
      values[t] = values[kRacers + t];
      return;
    case 4:  // atomic steps of all blocks, and of one block before it reads
      if (t == 0) {
        *reinterpret_cast<unsigned*>(values) = 0;
      }
      __syncthreads();
      atomicMax(marks, t);
      atomicOr(reinterpret_cast<unsigned*>(values), t);
      __syncthreads();
      *mine = *reinterpret_cast<unsigned*>(values) == kRacers - 1 ? x[t ^ 1] : 0;
      return;
    default:  // bytes beside each other, and global memory that a barrier of the block publishes
      shared[t] = static_cast<unsigned char>(t);
      *mine = x[t];
      __syncthreads();
      const float other = mine[int{shared[t ^ 1]} - static_cast<int>(t)];
      __syncthreads();
      *mine = other;
  }
}

}  // namespace mlr1::emulator
