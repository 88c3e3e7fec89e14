// Cross-entropy, one row of logits z, of which every thread and every block sees a part:
//   lse = log sum_v e^(z_v)      d / d z_v = pull * e^(z_v - lse) - weight * [v is the label]
// T is the type of the arithmetic: float for fp32, bf16 and fp16 logits, double for fp64.
#pragma once

#include <limits>

#include "common/math.h"

namespace mlr1 {

// What is known of some logits: the largest, and sum e^(z - top). A logit that is no number, or +inf,
// makes the sum not a number.
template <typename T>
struct SoftmaxSum {
  T top;
  T sum;
};

template <typename T>
MLR1_HOST_DEVICE constexpr SoftmaxSum<T> softmax_sum_of_none() {
  return {-std::numeric_limits<T>::infinity(), T(0)};
}

// What is taken off logits before the exponential: their top, but nothing where all are -inf, whose
// exponentials are zero then and not e^(-inf + inf).
template <typename T>
MLR1_HOST_DEVICE inline T origin_of(T top) {
  return top == -std::numeric_limits<T>::infinity() ? T(0) : top;
}

struct MergeSoftmaxSums {
  template <typename T>
  MLR1_HOST_DEVICE SoftmaxSum<T> operator()(const SoftmaxSum<T>& a, const SoftmaxSum<T>& b) const {
    const T top = larger(a.top, b.top);
    const T origin = origin_of(top);
    return {top, a.sum * exponential_of_any(a.top - origin) +
                     b.sum * exponential_of_any(b.top - origin)};
  }
};

// What the gradient of one row needs.
template <typename T>
struct GradientRow {
  T origin;  // taken off each logit
  T pull;    // factor of e^(z - origin)
  T weight;  // taken off at the label
};

template <typename T>
MLR1_HOST_DEVICE inline T softmax_pull(const GradientRow<T>& row, T z) {
  return row.pull * exponential_of_any(z - row.origin);
}

template <typename T>
MLR1_HOST_DEVICE inline T lse_of(const SoftmaxSum<T>& row) {
  return row.top + std::log(row.sum);
}

// For the gradient weight * [q (1 + 2 z_loss lse) - e_label]. The softmax q is e^(z - top) / sum and
// not e^(z - lse): z - top is exact near the top, where z - lse has the rounding of a large lse. A
// weight of zero makes the gradient zero, whatever the logits are.
template <typename T>
MLR1_HOST_DEVICE inline GradientRow<T> gradient_row(const SoftmaxSum<T>& row, T weight, T z_loss) {
  if (weight == 0) {
    return {T(0), T(0), T(0)};
  }
  const T pull = weight * (T(1) + T(2) * z_loss * lse_of(row));
  return {origin_of(row.top), pull / row.sum, weight};
}

}  // namespace mlr1
