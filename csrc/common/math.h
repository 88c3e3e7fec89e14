// Arithmetic that the CPU and the CUDA rows of an op share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MLR1_HOST_DEVICE __host__ __device__
#else
#define MLR1_HOST_DEVICE
#endif

namespace mlr1 {

MLR1_HOST_DEVICE inline double exponential(double x) { return std::exp(x); }

// On the host without a call or a branch, so that compilers turn loops over it into vector code:
// e^x = 2^n e^r with n = round(x / ln 2), and e^r by its Taylor polynomial of degree 7 on
// |r| <= ln 2 / 2, whose remainder there is 5e-9 of e^r. For |x| <= 87, where e^x is a normal number.
MLR1_HOST_DEVICE inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
#endif
}

template <typename T>
MLR1_HOST_DEVICE inline T sigmoid(T x) {
#if !defined(__CUDA_ARCH__)
  // Beyond 64 the result is 1 or less than 2e-28. No wider: products with subnormal numbers cost a
  // CPU a hundred cycles each, and compilers compute both sides of a bound for every element.
  x = x < T(-64) ? T(-64) : x;
  x = x > T(64) ? T(64) : x;
#endif
  return T(1) / (T(1) + exponential(-x));
}

}  // namespace mlr1
