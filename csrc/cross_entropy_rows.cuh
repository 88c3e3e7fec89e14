// Kernels of the ops of megatron_mlr1/ops/cross_entropy_rows.py.
//
// Bound by memory: they read each logit once, and write it once. A row is shared by the blocks of a
// cluster (of one block where there are none, or rows enough). Of kThreads threads each moves
// vectors of kVector logits, several at a time, so that loads overlap.
//
// Where a gradient is narrower than its logits, element v of a row takes bytes of the logits up to
// v: every store waits until the cluster has read that far.
#pragma once

#include <cstdint>

#include "common/device.h"
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
constexpr int kBatch = sizeof(scalar_t) == 8 ? 1 : sizeof(scalar_t) == 4 ? 4 : 2;

// Shared memory at the begin of a block's: what the reductions over a row need.
template <typename math_t, unsigned kThreads>
constexpr std::size_t kRowSumBytes =
    kReduceBytes<SoftmaxSum<math_t>, kThreads> + kClusterReduceBytes<SoftmaxSum<math_t>>;

// Adds logits to what a thread knows.
template <typename math_t, typename vector_t, int count>
__device__ inline void add_logits(SoftmaxSum<math_t>& known, const vector_t (&batch)[count]) {
  constexpr int kVector = sizeof(vector_t::at) / sizeof(vector_t::at[0]);
  math_t top = known.top;
#pragma unroll
  for (const vector_t& vector : batch) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      top = larger(top, static_cast<math_t>(vector.at[k]));
    }
  }
  const math_t origin = origin_of(top);
  math_t sum = known.sum * exponential_of_any(known.top - origin);
#pragma unroll
  for (const vector_t& vector : batch) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sum += exponential_of_any(static_cast<math_t>(vector.at[k]) - origin);
    }
  }
  known = {top, sum};
}

// Reads this thread's logits of [begin, end), and calls keep(column, vector) with each vector.
template <int kVector, unsigned kThreads, typename scalar_t, typename Keep>
__device__ inline SoftmaxSum<wide_t<scalar_t>> read_logits(const scalar_t* z, int begin, int end,
                                                           const Keep& keep) {
  using vector_t = Vector<scalar_t, kVector>;
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  constexpr int kMany = kBatch<scalar_t>;
  auto known = softmax_sum_of_none<wide_t<scalar_t>>();
  int column = begin + static_cast<int>(threadIdx.x) * kVector;
  for (; column + (kMany - 1) * kStride < end; column += kMany * kStride) {
    vector_t batch[kMany];
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      batch[b] = load_streaming(reinterpret_cast<const vector_t*>(z + column + b * kStride));
    }
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      keep(column + b * kStride, batch[b]);
    }
    add_logits(known, batch);
  }
  for (; column < end; column += kStride) {
    const vector_t one[1] = {load_streaming(reinterpret_cast<const vector_t*>(z + column))};
    keep(column, one[0]);
    add_logits(known, one);
  }
  return known;
}

// What the whole cluster knows of a row, from what its threads know. Behind it every thread of the
// cluster has read its logits.
template <unsigned kThreads, typename math_t>
__device__ inline SoftmaxSum<math_t> row_sum(SoftmaxSum<math_t> known, unsigned char* shared) {
  const MergeSoftmaxSums merge;
  known = block_reduce<kThreads>(known, merge, shared);
  cluster_wait();
  return cluster_reduce(known, merge, shared + kReduceBytes<SoftmaxSum<math_t>, kThreads>);
}

template <typename scalar_t>
__device__ inline wide_t<scalar_t> logit_at(const scalar_t* z, std::int64_t column) {
  return column < 0 ? wide_t<scalar_t>(0) : static_cast<wide_t<scalar_t>>(z[column]);
}

// Gradient of a vector of logits that begins at `column`.
template <typename gradient_t, typename scalar_t, int kVector>
__device__ inline Vector<gradient_t, kVector> gradient_of(
    const Vector<scalar_t, kVector>& z, const GradientRow<wide_t<scalar_t>>& row, int column,
    int label) {
  using math_t = wide_t<scalar_t>;
  math_t gradient[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    gradient[k] = softmax_pull(row, static_cast<math_t>(z.at[k]));
  }
  if (label >= column && label < column + kVector) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      gradient[k] -= label == column + k ? row.weight : math_t(0);
    }
  }
  Vector<gradient_t, kVector> out;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    out.at[k] = static_cast<gradient_t>(gradient[k]);
  }
  return out;
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
// which each block has its part; a narrower gradient waits until the tile is read.
template <typename gradient_t, int kVector, unsigned kThreads, typename scalar_t>
__device__ inline void overwrite_row(scalar_t* z, int columns, int label,
                                     const GradientRow<wide_t<scalar_t>>& row) {
  using vector_t = Vector<scalar_t, kVector>;
  using out_t = Vector<gradient_t, kVector>;
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  constexpr int kMany = kBatch<scalar_t>;
  constexpr int kPart = kMany * kStride;
  const int tile = kPart * static_cast<int>(cluster_size());
  gradient_t* const out = reinterpret_cast<gradient_t*>(z);
  for (int begin = 0; begin < columns; begin += tile) {
    const int first = begin + kPart * static_cast<int>(cluster_rank()) +
                      static_cast<int>(threadIdx.x) * kVector;
    vector_t batch[kMany];
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      const int column = first + b * kStride;
      if (column < columns) {
        batch[b] = load_streaming(reinterpret_cast<const vector_t*>(z + column));
      }
    }
    if constexpr (sizeof(gradient_t) < sizeof(scalar_t)) {
      cluster_sync();
    }
#pragma unroll
    for (int b = 0; b < kMany; ++b) {
      const int column = first + b * kStride;
      if (column < columns) {
        store_streaming(reinterpret_cast<out_t*>(out + column),
                        gradient_of<gradient_t>(batch[b], row, column, label));
      }
    }
  }
}

// [3, rows]: top, sum and the label's logit.
template <typename scalar_t, int kVector, unsigned kThreads>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_partials_kernel(const LogitRows<const scalar_t> of, wide_t<scalar_t>* out) {
  MLR1_SHARED(shared);
  cluster_arrive();
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
  using vector_t = Vector<scalar_t, kVector>;
  MLR1_SHARED(shared);
  cluster_arrive();
  const std::int64_t row = blockIdx.x / cluster_size();
  scalar_t* const z = of.logits + row * of.columns;
  const int label = static_cast<int>(of.label[row]);
  const int begin = static_cast<int>(cluster_rank()) * of.share;
  const int end = begin + of.share < of.columns ? begin + of.share : of.columns;
  // Each thread takes out of shared memory what it put there: no barrier lies between.
  scalar_t* const held =
      reinterpret_cast<scalar_t*>(shared + kRowSumBytes<math_t, kThreads>) - begin;
  math_t label_z = 0;
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    label_z = logit_at(z, label);
  }
  const auto known =
      read_logits<kVector, kThreads>(z, begin, end, [&](int column, const vector_t& vector) {
        if constexpr (kHeld) {
          *reinterpret_cast<vector_t*>(held + column) = vector;
        }
      });
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
      const vector_t vector = *reinterpret_cast<const vector_t*>(held + column);
      store_streaming(reinterpret_cast<Vector<gradient_t, kVector>*>(to + column),
                      gradient_of<gradient_t>(vector, given, column, label));
    }
  } else {
    overwrite_row<gradient_t, kVector, kThreads>(z, of.columns, label, given);
  }
}

}  // namespace mlr1
