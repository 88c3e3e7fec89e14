// Kernels of mlr1::sparse_kl_partials and sparse_kl_gradient_.
//
// Bound by memory: each logit is read once, and written once by the gradient. A block takes one
// row. What the target's ids add is found before the row is overwritten, and written after that:
// an id that comes more than once gets the same sum, in the order of the ids, from all its threads.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "kl_rows.cuh"
#include "sparse_kl_rows.h"

namespace mlr1 {

template <bool kHot, typename T>
struct MergeSparseKlSums {
  T inverse_temperature;

  MLR1_HOST_DEVICE SparseKlSums<T> operator()(const SparseKlSums<T>& a,
                                              const SparseKlSums<T>& b) const {
    return merged_sparse_kl_sums<kHot>(a, b, inverse_temperature);
  }
};

// Vectors of a row whose marks fit into shared memory: one byte each, a bit for each element; four of
// them are a word, which threads change by atomic operations.
constexpr int kMarkedVectors = 32768;

template <int kVector>
constexpr int marked_vectors(int width) {
  const int words = (width + 4 * kVector - 1) / (4 * kVector);
  return 4 * words < kMarkedVectors ? 4 * words : kMarkedVectors;
}

// Bytes of shared memory of sparse_kl_partials_kernel.
template <typename T, int kVector>
std::size_t sparse_kl_shared(int width, bool bucket) {
  return kReduceBytes<SparseKlSums<T>, kKlThreads> + (bucket ? marked_vectors<kVector>(width) : 0);
}

// Marks the target's ids among `count` vectors from column `begin` on.
template <int kVector>
__device__ inline void mark_columns(unsigned char* marks, int begin, int count,
                                    const std::int64_t* columns, int num_columns) {
  auto* const words = reinterpret_cast<unsigned*>(marks);
  for (int at = static_cast<int>(threadIdx.x); 4 * at < count; at += kKlThreads) {
    words[at] = 0;
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < num_columns; k += kKlThreads) {
    const std::int64_t at = columns[k] - begin;
    if (at >= 0 && at / kVector < count) {
      const auto vector = static_cast<unsigned>(at / kVector);
      const auto element = static_cast<unsigned>(at % kVector);
      atomicOr(words + vector / 4, 1u << (8 * (vector % 4) + element));
    }
  }
  __syncthreads();
}

// Adds a vector to sums; bit k of `marked` is set where the target names element k.
template <bool kHot, bool kBucket, int kVector, typename scalar_t>
__device__ inline void add_sparse_kl_vector(SparseKlSums<wide_t<scalar_t>>& sums,
                                            const Packed<Vector<scalar_t, kVector>>& packed,
                                            unsigned marked,
                                            wide_t<scalar_t> inverse_temperature) {
  using math_t = wide_t<scalar_t>;
  const auto z = widened(packed);
  math_t top = sums.top;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    top = larger(top, z.at[k]);
  }
  if (top > sums.top) {
    raise_sparse_kl_top<kHot>(sums, top, inverse_temperature);
  }
  const math_t base = base_of(sums.top);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const math_t apart = z.at[k] - base;
    const math_t q = exponential_of_any(apart);
    const math_t hot = kHot ? exponential_of_any(apart * inverse_temperature) : q;
    sums.q += q;
    sums.hot += hot;
    if (kBucket) {
      sums.rest += marked >> k & 1 ? math_t(0) : hot;
    }
  }
}

//   out   [6, rows]; a block for each row, sparse_kl_shared() of shared memory.
template <typename scalar_t, int kVector, bool kHot, bool kBucket>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    sparse_kl_partials_kernel(const scalar_t* __restrict__ logits,
                              const std::int64_t* __restrict__ labels,
                              const std::int64_t* __restrict__ columns_CK,
                              const wide_t<scalar_t>* __restrict__ weights_CK,
                              wide_t<scalar_t>* __restrict__ out, std::int64_t rows, int width,
                              int num_columns, wide_t<scalar_t> inverse_temperature) {
  using math_t = wide_t<scalar_t>;
  using sums_t = SparseKlSums<math_t>;
  MLR1_SHARED(shared);
  unsigned char* const marks = shared + kReduceBytes<sums_t, kKlThreads>;
  const std::int64_t row = blockIdx.x;
  const scalar_t* const z = logits + row * width;
  const std::int64_t* const columns = columns_CK + row * num_columns;
  const math_t* const weights = weights_CK + row * num_columns;
  sums_t sums = no_sparse_kl_sums<math_t>();
  const int part = kBucket ? marked_vectors<kVector>(width) : width / kVector;
  for (int begin = 0; begin < width; begin += part * kVector) {
    const int left = (width - begin) / kVector;
    const int count = left < part ? left : part;
    if (kBucket) {
      mark_columns<kVector>(marks, begin, count, columns, num_columns);
    }
    int at = static_cast<int>(threadIdx.x);
    Packed<Vector<scalar_t, kVector>> next{};
    if (at < count) {
      next = packed_at<kVector>(z + begin + at * kVector);
    }
    while (at < count) {
      const auto packed = next;
      const unsigned marked = kBucket ? marks[at] : 0;
      at += kKlThreads;
      if (at < count) {
        next = packed_at<kVector>(z + begin + at * kVector);
      }
      add_sparse_kl_vector<kHot, kBucket>(sums, packed, marked, inverse_temperature);
    }
    if (kBucket) {
      __syncthreads();
    }
  }
  math_t dot = 0;
  for (int k = static_cast<int>(threadIdx.x); k < num_columns; k += kKlThreads) {
    const std::int64_t column = columns[k];
    dot += column >= 0 && column < width ? static_cast<math_t>(z[column]) * weights[k] : math_t(0);
  }
  const MergeSparseKlSums<kHot, math_t> merge{inverse_temperature};
  sums = block_reduce<kKlThreads>(sums, merge, shared);
  dot = block_reduce<kKlThreads>(dot, Add{}, shared);
  if (threadIdx.x == 0) {
    const std::int64_t label = labels[row];
    const bool is_here = label >= 0 && label < width;
    write_sparse_kl_partials(sums, width, kHot, kBucket,
                             is_here ? static_cast<math_t>(z[label]) : math_t(0), dot,
                             inverse_temperature, out + row, rows);
  }
}

// The gradient at the id `column`, which the target names at least once.
template <bool kHot, typename T>
__device__ inline T gradient_at_named(T z, std::int64_t column, const std::int64_t* columns,
                                      const T* weights, int num_columns, std::int64_t label,
                                      const SparseKlRow<T>& row, bool bucket) {
  T sum = named_gradient<kHot>(z, row, bucket);
  for (int k = 0; k < num_columns; ++k) {
    if (columns[k] == column) {
      sum += pull_of_weight(z, weights[k], row, bucket);
    }
  }
  return column == label ? sum - row.weight : sum;
}

//   room_CK   [rows, num_columns]: kept between the two passes over the target's ids.
template <typename scalar_t, typename out_t, int kVector, bool kHot>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    sparse_kl_gradient_kernel(scalar_t* logits, const std::int64_t* __restrict__ labels,
                              const std::int64_t* __restrict__ columns_CK,
                              const wide_t<scalar_t>* __restrict__ weights_CK,
                              const wide_t<scalar_t>* __restrict__ rows_3C,
                              const wide_t<scalar_t>* __restrict__ weights_3C,
                              wide_t<scalar_t>* __restrict__ room_CK, std::int64_t rows, int width,
                              int num_columns, wide_t<scalar_t> inverse_temperature, bool bucket) {
  using math_t = wide_t<scalar_t>;
  const std::int64_t row = blockIdx.x;
  scalar_t* const z = logits + row * width;
  const std::int64_t label = labels[row];
  const std::int64_t* const columns = columns_CK + row * num_columns;
  const math_t* const weights = weights_CK + row * num_columns;
  math_t* const room = room_CK + row * num_columns;
  const auto numbers = sparse_kl_row(rows_3C, weights_3C, row, rows, inverse_temperature);
  for (int k = static_cast<int>(threadIdx.x); k < num_columns; k += kKlThreads) {
    const std::int64_t column = columns[k];
    if (column >= 0 && column < width) {
      room[k] = gradient_at_named<kHot>(static_cast<math_t>(z[column]), column, columns, weights,
                                        num_columns, label, numbers, bucket);
    }
  }
  __syncthreads();
  overwrite_row<out_t, kVector>(
      z, width,
      [&](int column) { return packed_at<kVector>(static_cast<const scalar_t*>(z) + column); },
      [&](int column, int k, const Vector<math_t, kVector>& vector) {
        const math_t made = sparse_kl_gradient<kHot>(vector.at[k], numbers);
        return column == label ? made - numbers.weight : made;
      });
  __syncthreads();
  auto* const written = reinterpret_cast<out_t*>(z);
  for (int k = static_cast<int>(threadIdx.x); k < num_columns; k += kKlThreads) {
    const std::int64_t column = columns[k];
    if (column >= 0 && column < width) {
      store_together(written + column, static_cast<out_t>(room[k]));
    }
  }
}

}  // namespace mlr1
