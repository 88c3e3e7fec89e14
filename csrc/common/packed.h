// Vectors as words, and their elements in the type of the arithmetic.
#pragma once

#include <c10/util/BFloat16.h>

#include <type_traits>

#include "common/device.h"
#include "common/math.h"
#include "common/vector.h"

namespace mlr1 {

template <int count, typename scalar_t>
__device__ inline Packed<Vector<scalar_t, count>> packed_at(const scalar_t* from) {
  return load_packed(reinterpret_cast<const Vector<scalar_t, count>*>(from));
}

template <int count, typename scalar_t>
__device__ inline Packed<Vector<scalar_t, count>> packed_seen_once(const scalar_t* from) {
  return load_packed_streaming(reinterpret_cast<const Vector<scalar_t, count>*>(from));
}

template <typename scalar_t, int count>
__device__ inline Vector<wide_t<scalar_t>, count> widened(
    const Packed<Vector<scalar_t, count>>& packed) {
  const auto vector = packed.value();
  Vector<wide_t<scalar_t>, count> wide;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    wide.at[k] = static_cast<wide_t<scalar_t>>(vector.at[k]);
  }
  return wide;
}

// The largest of `top` and of all elements; what is not a number is left out.
template <typename scalar_t, int count, int vectors>
__device__ inline wide_t<scalar_t> largest_of(
    wide_t<scalar_t> top, const Packed<Vector<scalar_t, count>> (&packed)[vectors]) {
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const auto wide = widened(packed[i]);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      top = larger(top, wide.at[k]);
    }
  }
  return top;
}

#if defined(__CUDA_ARCH__)
// A bf16 is the upper half of its fp32: one instruction each, where torch's conversion of an element
// that must first be taken out of its word makes two.
template <int count>
__device__ inline Vector<float, count> widened(
    const Packed<Vector<c10::BFloat16, count>>& packed) {
  Vector<float, count> wide;
  if constexpr (count == 1) {
    wide.at[0] = __uint_as_float(static_cast<unsigned>(packed.word) << 16);
  } else {
    unsigned words[count / 2];
    memcpy(words, &packed.word, sizeof(words));
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      wide.at[k] = __uint_as_float(words[k / 2] << 16);
      wide.at[k + 1] = __uint_as_float(words[k / 2] & 0xffff0000u);
    }
  }
  return wide;
}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two of them are compared by one instruction, and none need be widened for it.
template <int count, int vectors, std::enable_if_t<(count > 1), int> = 0>
__device__ inline float largest_of(float top,
                                   const Packed<Vector<c10::BFloat16, count>> (&packed)[vectors]) {
  unsigned words[vectors * count / 2];
  memcpy(words, packed, sizeof(words));
  unsigned pair = words[0];
#pragma unroll
  for (int i = 1; i < vectors * count / 2; ++i) {
    asm("max.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(words[i]));
  }
  return larger(larger(top, __uint_as_float(pair << 16)), __uint_as_float(pair & 0xffff0000u));
}
#endif

}  // namespace mlr1
