// One head of a fused QKV; megatron_mlr1/ops/qk_norm_rope.py has the formulas. T is the type of the
// arithmetic: float for fp32, bf16 and fp16 tensors, double for fp64.
#pragma once

#include "common/math.h"

namespace mlr1 {

// Two neighbours of a head, which one angle turns.
template <typename T>
struct Pair {
  T even;
  T odd;
};

template <typename T>
struct Turn {
  T cos;
  T sin;
};

enum class Kind { kQuery, kKey, kValue };

MLR1_HOST_DEVICE inline float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

MLR1_HOST_DEVICE inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }

template <typename T>
MLR1_HOST_DEVICE inline Turn<T> turn_by(float angle) {
  const T wide = angle;
#if defined(__CUDA_ARCH__)
  Turn<T> by;
  sincos(wide, &by.sin, &by.cos);
  return by;
#else
  return {std::cos(wide), std::sin(wide)};
#endif
}

template <typename T>
MLR1_HOST_DEVICE inline Pair<T> turn(Pair<T> x, Turn<T> by) {
  return {x.even * by.cos - x.odd * by.sin, x.odd * by.cos + x.even * by.sin};
}

template <typename T>
MLR1_HOST_DEVICE inline Pair<T> turn_back(Pair<T> x, Turn<T> by) {
  return {x.even * by.cos + x.odd * by.sin, x.odd * by.cos - x.even * by.sin};
}

// Gradient of what was normalised and turned: `out` is the result, `mean` that of grad * out.
template <typename T>
MLR1_HOST_DEVICE inline Pair<T> qk_norm_rope_gradient(Pair<T> grad, Pair<T> out, T mean, T scale,
                                                      Turn<T> by) {
  const Pair<T> dx =
      turn_back<T>({grad.even - out.even * mean, grad.odd - out.odd * mean}, by);
  return {dx.even * scale, dx.odd * scale};
}

// How a row of a fused QKV is laid out: in each group its query heads, its key, its value.
struct HeadLayout {
  int groups;
  int queries;  // heads of a group
  int width;    // of a head

  MLR1_HOST_DEVICE int heads() const { return groups * (queries + 2); }
  MLR1_HOST_DEVICE int query_heads() const { return groups * queries; }
  MLR1_HOST_DEVICE int scaled_heads() const { return groups * (queries + 1); }
};

// One head of a row, counted through.
struct HeadCursor {
  int number;  // in the row
  int group;
  int place;  // in the group

  MLR1_HOST_DEVICE void advance(int by, const HeadLayout& layout) {
    number += by;
    for (place += by; place >= layout.queries + 2; place -= layout.queries + 2) {
      ++group;
    }
  }
  MLR1_HOST_DEVICE Kind kind(const HeadLayout& layout) const {
    return place < layout.queries    ? Kind::kQuery
           : place == layout.queries ? Kind::kKey
                                     : Kind::kValue;
  }
  // Among the heads of its kind, of all tokens.
  MLR1_HOST_DEVICE std::int64_t of_kind(const HeadLayout& layout, std::int64_t token) const {
    return place < layout.queries ? token * layout.query_heads() + group * layout.queries + place
                                  : token * layout.groups + group;
  }
  // Among the scales of all tokens: in a row those of the queries lie before those of the keys.
  MLR1_HOST_DEVICE std::int64_t scale(const HeadLayout& layout, std::int64_t token) const {
    return token * layout.scaled_heads() +
           (place < layout.queries ? group * layout.queries + place : layout.query_heads() + group);
  }
};

// Position of a token in its document: bounds rise from 0, and a document may be empty.
MLR1_HOST_DEVICE inline std::int64_t position_in_document(const std::int32_t* bounds,
                                                          std::int64_t num_bounds,
                                                          std::int64_t token) {
  std::int64_t at = 0, beyond = num_bounds;  // bounds[at] <= token < bounds[beyond]
  while (beyond - at > 1) {
    const std::int64_t middle = (at + beyond) / 2;
    (bounds[middle] <= token ? at : beyond) = middle;
  }
  return token - bounds[at];
}

}  // namespace mlr1
