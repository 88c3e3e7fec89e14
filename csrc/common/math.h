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

// Type of the arithmetic on numbers that are stored as T: double for fp64, float for the others.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

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

MLR1_HOST_DEVICE inline double exponential_of_any(double x) { return std::exp(x); }

// e^x for every x: 0 where it is less than 2^-125, inf above 88, not a number where x is none. On
// the device by the one instruction for 2^y, so that a kernel stays bound by memory: there the error
// is at most 2^-22 + |x| 2^-24 of e^x.
MLR1_HOST_DEVICE inline float exponential_of_any(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  constexpr float kLeast = -87.0f;
  constexpr float kMost = 89.0f;  // n is 128 there, and 2^n the bits of inf
  float bounded = x < kLeast ? kLeast : x;
  bounded = bounded > kMost ? kMost : bounded;
  const float power = exponential(bounded);
  return x < kLeast ? 0.0f : power;
#endif
}

// Logarithms of a machine's own base: 2 for fp32 on a device, whose instructions are 2^y and log2, else
// e. There one joint product and sum takes a logit less its base to the exponent of a power, where a
// natural exponent takes one step more.
#if defined(__CUDA_ARCH__) || defined(MLR1_EMULATED)
constexpr bool kOwnBaseIsTwo = true;
#else
constexpr bool kOwnBaseIsTwo = false;
#endif

// What makes a natural logarithm one of the own base, and back.
template <typename T>
MLR1_HOST_DEVICE constexpr T to_own_base() {
  return kOwnBaseIsTwo && sizeof(T) == sizeof(float) ? T(1.44269504f) : T(1);
}
template <typename T>
MLR1_HOST_DEVICE constexpr T to_natural() {
  return kOwnBaseIsTwo && sizeof(T) == sizeof(float) ? T(0.693147181f) : T(1);
}

// x * scale - base, rounded once where the own base is 2.
MLR1_HOST_DEVICE inline double scaled_less(double x, double scale, double base) {
  return x * scale - base;
}
MLR1_HOST_DEVICE inline float scaled_less(float x, float scale, float base) {
#if defined(__CUDA_ARCH__) || defined(MLR1_EMULATED)
  return std::fma(x, scale, -base);
#else
  return x * scale - base;
#endif
}

// The own base to the power of any x, with the ends and the error of exponential_of_any().
MLR1_HOST_DEVICE inline double power(double x) { return exponential_of_any(x); }
MLR1_HOST_DEVICE inline float power(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#elif defined(MLR1_EMULATED)
  return std::exp2(x);
#else
  return exponential_of_any(x);
#endif
}

// The larger one; the first where the second is not a number.
template <typename T>
MLR1_HOST_DEVICE inline T larger(T a, T b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a < b ? b : a;
#endif
}

MLR1_HOST_DEVICE inline double reciprocal(double x) { return 1.0 / x; }

// On the device by its instruction, off by at most one unit in the last place, and zero beyond 2^126:
// a division is a call for numbers out of the ordinary, and a call in a loop keeps compilers from
// joining the stores behind it.
MLR1_HOST_DEVICE inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}

MLR1_HOST_DEVICE inline double one_and(double x) { return 1.0 + x; }

// 1 + x, rounded by itself: on the device not joined with the product that made x, as compilers would
// do in one kernel and not in the next. Two ops that compute the same then give the same bits.
MLR1_HOST_DEVICE inline float one_and(float x) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(1.0f, x);
#else
  return 1.0f + x;
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
  return reciprocal(one_and(exponential(-x)));
}

}  // namespace mlr1
