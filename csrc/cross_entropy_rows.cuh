// Kernels of the ops of megatron_mlr1/ops/cross_entropy_rows.py.
//
// Bound by memory: they read each logit once, and write it once. A row is shared by the blocks of a
// cluster (of one block where there are none, or rows enough). Of kThreads threads each moves
// vectors of kVector logits, several at a time, so that loads overlap.
//
// Where a gradient is narrower than its logits, element v of a row takes bytes of the logits up to
// v: every store waits until the cluster has read that far.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/device.h"
#include "common/packed.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "cross_entropy_rows.h"

namespace mlr1 {

// Rows of logits, and what is known of each.
template <typename scalar_t>
struct LogitRows {
  scalar_t* logits;           // [rows, columns]; overwritten where there is a gradient
  const std::int64_t* label;  // [rows]; -1 for none
  std::int64_t rows;
  int columns;  // a multiple of kVector
  int share;    // columns of one block of the cluster, a multiple of kVector
};

template <typename T>
struct RowWeights {
  const T* lse;
  const T* pull;
  const T* weight;
};

// Vectors that a thread has under way: as many as leave registers for three blocks of 512 threads.
template <typename scalar_t>
constexpr int kBatch = sizeof(scalar_t) == 8 ? 1 : std::is_same_v<scalar_t, c10::Half> ? 2 : 4;

// Shared memory at the begin of a block's: what the reductions over a row need.
template <typename math_t, unsigned kThreads>
constexpr std::size_t kRowSumBytes =
    kReduceBytes<SoftmaxSum<math_t>, kThreads> + kClusterReduceBytes<SoftmaxSum<math_t>>;

// Adds logits to what a thread knows.
template <typename math_t, typename packed_t, int count>
__device__ inline void add_logits(SoftmaxSum<math_t>& known, const packed_t (&batch)[count]) {
  const math_t top = largest_of(known.top, batch);
  const math_t origin = origin_of(top);
  math_t sum = known.sum * exponential_of_any(known.top - origin);
#pragma unroll
  for (const packed_t& packed : batch) {
    const auto vector = widened(packed);
#pragma unroll
    for (const math_t z : vector.at) {
      sum += exponential_of_any(z - origin);
    }
  }
  known = {top, sum};
}

// A vector of logits that are not there: they add nothing.
template <int kVector, typename scalar_t>
__device__ inline Packed<Vector<scalar_t, kVector>> no_logits() {
  Vector<scalar_t, kVector> none;
#pragma unroll
  for (scalar_t& z : none.at) {
    z = static_cast<scalar_t>(-std::numeric_limits<float>::infinity());
  }
  return packed_of(none);
}

// Reads this thread's logits of [begin, end), and calls keep(column, packed vector) with each
// vector. The last ones, fewer than a batch, are under way together too.
template <int kVector, unsigned kThreads, typename scalar_t, typename Keep>
__device__ inline SoftmaxSum<wide_t<scalar_t>> read_logits(const scalar_t* z, int begin, int end,
                                                           const Keep& keep) {
  using packed_t = Packed<Vector<scalar_t, kVector>>;
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  constexpr int kMany = kBatch<scalar_t>;
  auto known = softmax_sum_of_none<wide_t<scalar_t>>();
  int column = begin + static_cast<int>(threadIdx.x) * kVector;
  for (; column + (kMany - 1) * kStride < end; column += kMany * kStride) {
    packed_t batch[kMany];
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      batch[b] = packed_seen_once<kVector>(z + column + b * kStride);
    }
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      keep(column + b * kStride, batch[b]);
    }
    add_logits(known, batch);
  }
  if (column < end) {
    packed_t batch[kMany];
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      batch[b] = no_logits<kVector, scalar_t>();
      if (column + b * kStride < end) {
        batch[b] = packed_seen_once<kVector>(z + column + b * kStride);
      }
    }
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      if (column + b * kStride < end) {
        keep(column + b * kStride, batch[b]);
      }
    }
    add_logits(known, batch);
  }
  return known;
}

// Finds the top of the lanes first, so that each makes its sum relative to it once.
template <typename T>
struct MergeSums {
  __device__ SoftmaxSum<T> none() const { return softmax_sum_of_none<T>(); }

  template <unsigned width>
  __device__ SoftmaxSum<T> over_lanes(const SoftmaxSum<T>& known) const {
    const T top = warp_reduce<width>(known.top, Largest{});
    const T scaled = known.sum * exponential_of_any(known.top - origin_of(top));
    return {top, warp_reduce<width>(scaled, Add{})};
  }
};

// What the whole cluster knows of a row, from what its threads know. Behind it every thread of the
// cluster has read its logits.
template <unsigned kThreads, typename math_t>
__device__ inline SoftmaxSum<math_t> row_sum(SoftmaxSum<math_t> known, unsigned char* shared) {
  const MergeSums<math_t> merge;
  known = block_reduce<kThreads>(known, merge, shared);
  cluster_wait();
  return cluster_reduce(known, merge, shared + kReduceBytes<SoftmaxSum<math_t>, kThreads>);
}

template <typename scalar_t>
__device__ inline wide_t<scalar_t> logit_at(const scalar_t* z, std::int64_t column) {
  return column < 0 ? wide_t<scalar_t>(0) : static_cast<wide_t<scalar_t>>(z[column]);
}

// Gradient of a vector of logits, but for the label's weight.
template <typename gradient_t, typename scalar_t, int kVector>
__device__ inline Vector<gradient_t, kVector> pulls_of(
    const Packed<Vector<scalar_t, kVector>>& packed, const GradientRow<wide_t<scalar_t>>& row) {
  const auto z = widened(packed);
  Vector<gradient_t, kVector> out;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    out.at[k] = static_cast<gradient_t>(softmax_pull(row, z.at[k]));
  }
  return out;
}

// Gradient at the label.
template <typename gradient_t, typename T>
__device__ inline gradient_t gradient_at_label(const GradientRow<T>& row, T z) {
  return static_cast<gradient_t>(softmax_pull(row, z) - row.weight);
}

template <int kVector, unsigned kThreads, typename gradient_t>
__device__ inline void write_zeros(gradient_t* out, int begin, int end) {
  using vector_t = Vector<gradient_t, kVector>;
  vector_t zeros;
#pragma unroll
  for (gradient_t& zero : zeros.at) {
    zero = static_cast<gradient_t>(0.0f);
  }
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  for (int column = begin + static_cast<int>(threadIdx.x) * kVector; column < end;
       column += kStride) {
    store_streaming(reinterpret_cast<vector_t*>(out + column), zeros);
  }
}

// Overwrites a row by its gradient. The cluster walks over it front to back, a tile at a time of
// which each block has its part. A narrower tile lies where tiles of at most half its number were:
// they must have been read by all, and a barrier behind the loads of tiles 0, 1, 2, 4, 8 ... sees to
// that.
template <typename gradient_t, int kVector, unsigned kThreads, typename scalar_t>
__device__ inline void overwrite_row(scalar_t* z, int columns, int label,
                                     const GradientRow<wide_t<scalar_t>>& row) {
  using packed_t = Packed<Vector<scalar_t, kVector>>;
  using out_t = Vector<gradient_t, kVector>;
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  constexpr int kMany = kBatch<scalar_t>;
  constexpr int kPart = kMany * kStride;
  gradient_t* const out = reinterpret_cast<gradient_t*>(z);
  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  // The label's gradient is written once more, by the thread that has written there.
  const bool has_label =
      label >= 0 && label / kPart % blocks == rank &&
      static_cast<unsigned>(label % kPart % kStride / kVector) == threadIdx.x;
  const auto label_z = logit_at(z, has_label ? label : -1);
  for (int tile = 0; tile * blocks * kPart < columns; ++tile) {
    const int first =
        (tile * blocks + rank) * kPart + static_cast<int>(threadIdx.x) * kVector;
    packed_t batch[kMany];
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      const int column = first + b * kStride;
      if (column < columns) {
        batch[b] = packed_seen_once<kVector>(z + column);
      }
    }
    if (sizeof(gradient_t) < sizeof(scalar_t) && (tile & (tile - 1)) == 0) {
      cluster_sync();
    }
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      const int column = first + b * kStride;
      if (column < columns) {
        store_streaming(reinterpret_cast<out_t*>(out + column),
                        pulls_of<gradient_t>(batch[b], row));
      }
    }
  }
  if (has_label) {
    out[label] = gradient_at_label<gradient_t>(row, label_z);
  }
}

// [3, rows]: top, sum and the label's logit.
template <typename scalar_t, int kVector, unsigned kThreads>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_partials_kernel(const LogitRows<const scalar_t> of, wide_t<scalar_t>* out) {
  MLR1_SHARED(shared);
  cluster_arrive_unwritten();
  const std::int64_t row = blockIdx.x / cluster_size();
  const scalar_t* const z = of.logits + row * of.columns;
  const int begin = static_cast<int>(cluster_rank()) * of.share;
  const int end = begin + of.share < of.columns ? begin + of.share : of.columns;
  const auto known =
      read_logits<kVector, kThreads>(z, begin, end, [](int, const auto&) {});
  const auto sum = row_sum<kThreads>(known, shared);
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    out[row] = sum.top;
    out[of.rows + row] = sum.sum;
    out[2 * of.rows + row] = logit_at(z, of.label[row]);
  }
}

template <typename scalar_t, typename gradient_t, int kVector, unsigned kThreads>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_gradient_kernel(const LogitRows<scalar_t> of,
                                  const RowWeights<wide_t<scalar_t>> weights) {
  const std::int64_t row = blockIdx.x / cluster_size();
  scalar_t* const z = of.logits + row * of.columns;
  const GradientRow<wide_t<scalar_t>> given{weights.lse[row], weights.pull[row],
                                            weights.weight[row]};
  if (given.pull == 0 && given.weight == 0) {
    const int begin = static_cast<int>(cluster_rank()) * of.share;
    const int end = begin + of.share < of.columns ? begin + of.share : of.columns;
    write_zeros<kVector, kThreads>(reinterpret_cast<gradient_t*>(z), begin, end);
    return;
  }
  overwrite_row<gradient_t, kVector, kThreads>(z, of.columns, static_cast<int>(of.label[row]),
                                               given);
}

// Both in one: [2, rows] of lse and the label's logit, and the gradient. kHeld: the cluster's shared
// memory holds the row, so that it is read once; else it is read again for the gradient.
template <typename scalar_t, typename gradient_t, int kVector, unsigned kThreads, bool kHeld>
__global__ void __launch_bounds__(kThreads, kHeld && sizeof(scalar_t) <= 4 ? 3 : 1)
    cross_entropy_kernel(const LogitRows<scalar_t> of, const wide_t<scalar_t>* weights,
                         wide_t<scalar_t> z_loss, wide_t<scalar_t>* out) {
  using math_t = wide_t<scalar_t>;
  using packed_t = Packed<Vector<scalar_t, kVector>>;
  MLR1_SHARED(shared);
  cluster_arrive_unwritten();
  const std::int64_t row = blockIdx.x / cluster_size();
  scalar_t* const z = of.logits + row * of.columns;
  const int begin = static_cast<int>(cluster_rank()) * of.share;
  const int end = begin + of.share < of.columns ? begin + of.share : of.columns;
  // Each thread takes out of shared memory what it put there: no barrier lies between.
  scalar_t* const held =
      reinterpret_cast<scalar_t*>(shared + kRowSumBytes<math_t, kThreads>) - begin;
  math_t label_z = 0;
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    label_z = logit_at(z, of.label[row]);
  }
  const auto known =
      read_logits<kVector, kThreads>(z, begin, end, [&](int column, const packed_t& packed) {
        if constexpr (kHeld) {
          *reinterpret_cast<packed_t*>(held + column) = packed;
        }
      });
  const int label = static_cast<int>(of.label[row]);
  const auto sum = row_sum<kThreads>(known, shared);
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    out[row] = lse_of(sum);
    out[of.rows + row] = label_z;
  }
  const auto given = gradient_row(sum, weights[row], z_loss);
  gradient_t* const to = reinterpret_cast<gradient_t*>(z);
  if (given.weight == 0) {
    write_zeros<kVector, kThreads>(to, begin, end);
  } else if constexpr (kHeld) {
    constexpr int kStride = static_cast<int>(kThreads) * kVector;
    for (int column = begin + static_cast<int>(threadIdx.x) * kVector; column < end;
         column += kStride) {
      const packed_t packed = *reinterpret_cast<const packed_t*>(held + column);
      store_streaming(reinterpret_cast<Vector<gradient_t, kVector>*>(to + column),
                      pulls_of<gradient_t>(packed, given));
    }
    // The label's is written once more, by the thread that has written there.
    if (label >= begin && label < end &&
        static_cast<unsigned>((label - begin) / kVector) % kThreads == threadIdx.x) {
      to[label] = gradient_at_label<gradient_t>(given, static_cast<math_t>(held[label]));
    }
  } else {
    overwrite_row<gradient_t, kVector, kThreads>(z, of.columns, label, given);
  }
}

}  // namespace mlr1
