// SwiGLU with FP8 output, one element: E4M3(silu(gate) * up * scale).
// E4M3 has 1 bit for the sign, 4 for the exponent (bias 7) and 3 for the fraction, and no
// infinities: magnitudes up to 448, 0x7f is not a number, numbers below 2^-6 are multiples of 2^-9
// (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1).
#pragma once

#include <cstdint>
#include <cstring>

#include "swiglu.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#include <cuda_fp8.h>
#endif

namespace mlr1 {

MLR1_HOST_DEVICE inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Rounds to the nearest E4M3, ties to even; beyond 448 it is 448, and what is not a number is 0x7f.
// Devices that convert by an instruction (from 8.9 on) use that. Elsewhere it is whole-number
// arithmetic without a branch, so that compilers turn loops over it into vector code.
MLR1_HOST_DEVICE inline std::uint8_t e4m3_of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  constexpr std::uint32_t kInfinite = 0x7f800000u;  // what is above it is not a number
  constexpr std::uint32_t kLargest = 0x43e00000u;   // 448
  constexpr std::uint32_t kNormal = 0x3c800000u;    // 2^-6
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 24) & 0x80u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t bound = magnitude < kLargest ? magnitude : kLargest;
  // 23 fraction bits to 3: half a unit less one, and one more where the unit is odd.
  const std::uint32_t normal =
      ((bound + 0x7ffffu + ((bound >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
  // The last bit of a number between 2^14 and 2^15 is worth 2^-9: adding 2^14 rounds to it.
  float small;
  std::memcpy(&small, &bound, sizeof(small));
  const std::uint32_t subnormal = bits_of(small + 16384.0f) & 0xfu;
  const std::uint32_t number = bound < kNormal ? subnormal : normal;
  return static_cast<std::uint8_t>(magnitude > kInfinite ? 0x7fu : (sign | number));
#endif
}

// The bits of |x|, which order as the numbers do; 0 for what is not a number, so that a maximum
// over them is that of the numbers and does not depend on any order.
MLR1_HOST_DEVICE inline std::uint32_t magnitude_of(float x) {
  const std::uint32_t bits = bits_of(x) & 0x7fffffffu;
  return bits > 0x7f800000u ? 0u : bits;
}

// What the plain op would have stored, as a float: rounded once to the stored type.
template <typename scalar_t>
MLR1_HOST_DEVICE inline float swiglu_stored(scalar_t gate, scalar_t up) {
  return static_cast<float>(static_cast<scalar_t>(
      swiglu<float>(static_cast<float>(gate), static_cast<float>(up))));
}

}  // namespace mlr1
