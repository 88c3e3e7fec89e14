// SwiGLU, one element: out = silu(gate) * up with silu(x) = x * sigmoid(x).
//   d out / d gate = up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
//   d out / d up   = silu(gate)
// T is the type of the arithmetic: float for fp32, bf16 and fp16 tensors, double for fp64.
#pragma once

#include "common/math.h"

namespace mlr1 {

template <typename T>
struct SwigluGradient {
  T gate;
  T up;
};

template <typename T>
MLR1_HOST_DEVICE inline T swiglu(T gate, T up) {
  return gate * sigmoid(gate) * up;
}

template <typename T>
MLR1_HOST_DEVICE inline SwigluGradient<T> swiglu_gradient(T grad_out, T gate, T up) {
  const T s = sigmoid(gate);
  return {grad_out * up * s * (T(1) + gate * (T(1) - s)), grad_out * gate * s};
}

}  // namespace mlr1
