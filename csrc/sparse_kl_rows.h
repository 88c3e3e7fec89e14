// Row arithmetic of mlr1::sparse_kl_partials and sparse_kl_gradient_
// (megatron_mlr1/ops/sparse_kl_rows.py): what one logit z adds, how sums over parts of a row become
// one, what it is written as. The formulas stand in megatron_mlr1/ops/linear_sparse_kl.py.
// T is the type of the arithmetic: float for fp32, bf16 and fp16 logits, double for fp64.
#pragma once

#include <cstdint>
#include <limits>

#include "kl_rows.h"

namespace mlr1 {

constexpr int kSparseKlPartials = 6;

// What exponents are taken relative to: the largest logit, or a finite number where there is none.
template <typename T>
MLR1_HOST_DEVICE inline T base_of(T top) {
  constexpr T kLowest = std::numeric_limits<T>::lowest();
  return larger(top, kLowest);
}

// Sums over some columns of a row.
template <typename T>
struct SparseKlSums {
  T top;   // largest z, -inf where there are no columns
  T q;     // of e^(z - top)
  T hot;   // of e^((z - top) / T); unused at temperature 1
  T rest;  // of the same, over the ids that the target does not name; unused without a bucket
};

template <typename T>
MLR1_HOST_DEVICE inline SparseKlSums<T> no_sparse_kl_sums() {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  return {kNone, T(0), T(0), T(0)};
}

// Makes sums relative to a larger top.
template <bool kHot, typename T>
MLR1_HOST_DEVICE inline void raise_sparse_kl_top(SparseKlSums<T>& sums, T top,
                                                 T inverse_temperature) {
  const T shift = base_of(sums.top) - base_of(top);
  const T factor = exponential_of_any(shift);
  const T hot_factor = kHot ? exponential_of_any(shift * inverse_temperature) : factor;
  sums.top = top;
  sums.q *= factor;
  sums.hot *= hot_factor;
  sums.rest *= hot_factor;
}

// Sums over the columns of both.
template <bool kHot, typename T>
MLR1_HOST_DEVICE inline SparseKlSums<T> merged_sparse_kl_sums(SparseKlSums<T> a, SparseKlSums<T> b,
                                                              T inverse_temperature) {
  const T top = larger(a.top, b.top);
  raise_sparse_kl_top<kHot>(a, top, inverse_temperature);
  raise_sparse_kl_top<kHot>(b, top, inverse_temperature);
  return {top, a.q + b.q, a.hot + b.hot, a.rest + b.rest};
}

// Writes one row's partials to out[0], out[stride], ... out[5 * stride].
//   label_z   z at the label; zero where it is in another shard.
//   dot       sum of weight * z over the target's ids.
template <typename T>
MLR1_HOST_DEVICE inline void write_sparse_kl_partials(const SparseKlSums<T>& sums, int width,
                                                      bool hot, bool bucket, T label_z, T dot,
                                                      T inverse_temperature, T* out,
                                                      std::int64_t stride) {
  // Zero, but NaN where the largest is not finite, as a softmax of such logits is.
  const T hurt = width > 0 ? sums.top - sums.top : T(0);
  out[0] = sums.top;
  out[stride] = sums.q + hurt;
  out[2 * stride] = (hot ? sums.hot : sums.q) + hurt;
  out[3 * stride] = bucket ? sums.rest + hurt : T(0);
  out[4 * stride] = label_z;
  out[5 * stride] = dot * inverse_temperature;
}

// rows_3C and weights_3C of the definition, one row of them.
template <typename T>
struct SparseKlRow {
  T lse, hot_lse;
  T outside;  // kd times the factor of q' at ids that the target does not name
  T pull, weight, kd;
  T inverse_temperature;
};

template <typename T>
MLR1_HOST_DEVICE inline SparseKlRow<T> sparse_kl_row(const T* rows_3C, const T* weights_3C,
                                                     std::int64_t row, std::int64_t stride,
                                                     T inverse_temperature) {
  const T kd = weights_3C[row + 2 * stride];
  return {rows_3C[row],
          rows_3C[row + stride],
          kd * rows_3C[row + 2 * stride],
          weights_3C[row],
          weights_3C[row + stride],
          kd,
          inverse_temperature};
}

template <typename T>
MLR1_HOST_DEVICE inline T hot_softmax(T z, const SparseKlRow<T>& row) {
  return exponential_of_any(z * row.inverse_temperature - row.hot_lse);
}

// The gradient at an id that the target does not name, but for the label's weight.
template <bool kHot, typename T>
MLR1_HOST_DEVICE inline T sparse_kl_gradient(T z, const SparseKlRow<T>& row) {
  const T q = exponential_of_any(z - row.lse);
  return q * row.pull + (kHot ? hot_softmax(z, row) : q) * row.outside;
}

// What the gradient at an id that the target names begins with: in a bucket's target such an id is
// not outside, and gets its q' with each weight instead.
template <bool kHot, typename T>
MLR1_HOST_DEVICE inline T named_gradient(T z, const SparseKlRow<T>& row, bool bucket) {
  return bucket ? exponential_of_any(z - row.lse) * row.pull : sparse_kl_gradient<kHot>(z, row);
}

// What one of the target's weights adds at its id.
template <typename T>
MLR1_HOST_DEVICE inline T pull_of_weight(T z, T weight, const SparseKlRow<T>& row, bool bucket) {
  return ((bucket ? hot_softmax(z, row) : T(0)) - weight) * row.kd;
}

}  // namespace mlr1
