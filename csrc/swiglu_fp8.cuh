// Kernel of mlr1::swiglu_fp8.
//
// Bound by memory: reads 2F numbers a row and writes F bytes, or 2F with the transposed copy.
// A block of 256 threads takes a tile of 128 rows and 128 columns. A thread takes 8 columns of 4
// rows at a time: it loads 16 bytes of gate and of up a row, stores 8, and keeps each column's 4
// bytes as one word; the tile in shared memory is made of these. A warp then stores the 128 bytes
// of a column.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "common/device.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "swiglu_fp8.h"

namespace mlr1 {

constexpr unsigned kFp8Threads = 256;
constexpr unsigned kFp8Tile = 128;   // rows and columns of a tile
constexpr unsigned kFp8Columns = 8;  // of a thread
constexpr unsigned kFp8Rows = 4;     // of a thread at a time, the bytes of a word
constexpr unsigned kFp8Words = kFp8Tile / kFp8Rows;  // of a column of a tile, one for each lane
static_assert(kFp8Words == kWarp, "a warp stores a column of a tile");
constexpr std::size_t kFp8SharedBytes = kFp8Tile * kFp8Tile;

struct Larger {
  MLR1_HOST_DEVICE std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const {
    return a > b ? a : b;
  }
};

// *at = max(*at, value), both the bits of numbers that are not negative.
__device__ inline void raise_to(float* at, std::uint32_t value) {
  atomicMax(reinterpret_cast<unsigned*>(at), value);
}

template <typename scalar_t>
struct alignas(kVectorBytes) Columns {
  scalar_t at[kFp8Columns];
};

struct alignas(kFp8Columns) ColumnBytes {
  std::uint8_t at[kFp8Columns];
};

// Loads `count` neighbours; `whole` says that count is kFp8Columns and `from` aligned to 16 bytes.
template <bool whole, typename scalar_t>
__device__ inline Columns<scalar_t> load_columns(const scalar_t* from, std::int64_t count) {
  if constexpr (whole) {
    return *reinterpret_cast<const Columns<scalar_t>*>(from);
  } else {
    Columns<scalar_t> loaded;
    for (unsigned k = 0; k < kFp8Columns; ++k) {
      loaded.at[k] = k < count ? from[k] : static_cast<scalar_t>(0.0f);
    }
    return loaded;
  }
}

// Rounds two numbers to what the plain op would have stored.
template <typename scalar_t>
__device__ inline void round_to_stored(float& a, float& b) {
  a = static_cast<float>(static_cast<scalar_t>(a));
  b = static_cast<float>(static_cast<scalar_t>(b));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// In one instruction: that for one number is of the unit that has the exponentials to do.
template <>
__device__ inline void round_to_stored<c10::BFloat16>(float& a, float& b) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  a = __uint_as_float(pair << 16);
  b = __uint_as_float(pair & 0xffff0000u);
}
#endif

// The larger one of `largest`, the bits of a number that is not negative, and the bits of |value|;
// the first where the second is not a number.
__device__ inline std::uint32_t larger_magnitude(std::uint32_t largest, float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(fmaxf(__uint_as_float(largest), fabsf(value)));
#else
  return Larger{}(largest, magnitude_of(value));
#endif
}

// Devices that convert by an instruction convert two at a time.
__device__ inline ColumnBytes e4m3_of_columns(const float (&values)[kFp8Columns], float factor) {
  ColumnBytes bytes;
#pragma unroll
  for (unsigned k = 0; k < kFp8Columns; k += 2) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(
        make_float2(values[k] * factor, values[k + 1] * factor), __NV_SATFINITE, __NV_E4M3);
    memcpy(bytes.at + k, &pair, sizeof(pair));
#else
    bytes.at[k] = e4m3_of(values[k] * factor);
    bytes.at[k + 1] = e4m3_of(values[k + 1] * factor);
#endif
  }
  return bytes;
}

// Makes words of which number k has byte k of each row.
__device__ inline void turn_bytes(const ColumnBytes (&rows)[kFp8Rows],
                                  std::uint32_t (&words)[kFp8Columns]) {
#pragma unroll
  for (unsigned half = 0; half < kFp8Columns; half += 4) {
#if defined(__CUDA_ARCH__)
    std::uint32_t of[kFp8Rows];
#pragma unroll
    for (unsigned r = 0; r < kFp8Rows; ++r) {
      memcpy(of + r, rows[r].at + half, sizeof(of[r]));
    }
    const std::uint32_t low[] = {__byte_perm(of[0], of[1], 0x5140),
                                 __byte_perm(of[2], of[3], 0x5140)};
    const std::uint32_t high[] = {__byte_perm(of[0], of[1], 0x7362),
                                  __byte_perm(of[2], of[3], 0x7362)};
    words[half] = __byte_perm(low[0], low[1], 0x5410);
    words[half + 1] = __byte_perm(low[0], low[1], 0x7632);
    words[half + 2] = __byte_perm(high[0], high[1], 0x5410);
    words[half + 3] = __byte_perm(high[0], high[1], 0x7632);
#else
    for (unsigned k = half; k < half + 4; ++k) {
      words[k] = 0;
      for (unsigned r = 0; r < kFp8Rows; ++r) {
        words[k] |= static_cast<std::uint32_t>(rows[r].at[k]) << (8 * r);
      }
    }
#endif
  }
}

// Where the tile in shared memory has a word of a column. All columns begin in one bank: without
// the turn by the column's group, the words that a warp writes at once, two of 16 groups, would lie
// in two banks; with it every lane has its own.
__device__ inline unsigned word_at(unsigned column, unsigned word) {
  return column * kFp8Words + (word + 2 * (column / kFp8Columns)) % kFp8Words;
}

// x [rows, 2 width] to y [rows, width] and, unless yt is null, yt [width, rows], one block a tile.
// amax is raised to the largest magnitude before scaling, and 1 / scale is written. `whole`: width
// is a multiple of 8, rows one of 4, and all pointers are aligned to 16 bytes.
template <typename scalar_t, bool whole>
__global__ void __launch_bounds__(kFp8Threads)
    swiglu_fp8_kernel(const scalar_t* __restrict__ x, const float* __restrict__ scale,
                      std::uint8_t* __restrict__ y, std::uint8_t* __restrict__ yt,
                      float* __restrict__ amax, float* __restrict__ scale_inv, std::int64_t rows,
                      std::int64_t width) {
  MLR1_SHARED(shared);
  std::uint32_t* const tile = reinterpret_cast<std::uint32_t*>(shared);
  const std::int64_t across = (width + kFp8Tile - 1) / kFp8Tile;
  const std::int64_t row_begin = blockIdx.x / across * kFp8Tile;
  const std::int64_t column_begin = blockIdx.x % across * kFp8Tile;
  const unsigned group = threadIdx.x % (kFp8Tile / kFp8Columns);
  const std::int64_t column = column_begin + group * kFp8Columns;
  const std::int64_t count = width - column < kFp8Columns ? width - column : kFp8Columns;
  const float factor = *scale;
  std::uint32_t largest = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *scale_inv = 1.0f / factor;
  }
  constexpr unsigned kStep = kFp8Threads / (kFp8Tile / kFp8Columns);  // words that a round makes
#pragma unroll
  for (unsigned word = threadIdx.x / (kFp8Tile / kFp8Columns); word < kFp8Words; word += kStep) {
    const std::int64_t row = row_begin + word * kFp8Rows;
    ColumnBytes bytes[kFp8Rows] = {};
#pragma unroll
    for (unsigned r = 0; r < kFp8Rows; ++r) {
      if (count > 0 && row + r < rows) {
        const scalar_t* const in = x + (row + r) * 2 * width + column;
        const Columns<scalar_t> gate = load_columns<whole>(in, count);
        const Columns<scalar_t> up = load_columns<whole>(in + width, count);
        float values[kFp8Columns];
#pragma unroll
        for (unsigned k = 0; k < kFp8Columns; ++k) {
          values[k] = swiglu<float>(static_cast<float>(gate.at[k]), static_cast<float>(up.at[k]));
        }
#pragma unroll
        for (unsigned k = 0; k < kFp8Columns; k += 2) {
          round_to_stored<scalar_t>(values[k], values[k + 1]);
        }
        bytes[r] = e4m3_of_columns(values, factor);
#pragma unroll
        for (unsigned k = 0; k < kFp8Columns; ++k) {
          largest = larger_magnitude(largest, values[k]);
        }
        std::uint8_t* const out = y + (row + r) * width + column;
        if constexpr (whole) {
          store_whole(reinterpret_cast<ColumnBytes*>(out), bytes[r]);
        } else {
          for (unsigned k = 0; k < kFp8Columns && k < count; ++k) {
            out[k] = bytes[r].at[k];
          }
        }
      }
    }
    if (yt != nullptr) {
      std::uint32_t words[kFp8Columns];
      turn_bytes(bytes, words);
#pragma unroll
      for (unsigned k = 0; k < kFp8Columns; ++k) {
        tile[word_at(group * kFp8Columns + k, word)] = words[k];
      }
    }
  }
  if (yt != nullptr) {
    __syncthreads();
    constexpr unsigned kWarps = kFp8Threads / kWarp;
    const unsigned lane = threadIdx.x % kWarp;
    const std::int64_t row = row_begin + lane * kFp8Rows;
    const std::int64_t left = width - column_begin;
    const unsigned end = row >= rows ? 0 : left < kFp8Tile ? static_cast<unsigned>(left) : kFp8Tile;
    unsigned k = threadIdx.x / kWarp;
    std::uint8_t* out = yt + (column_begin + k) * rows + row;
    for (; k < end; k += kWarps, out += kWarps * rows) {
      const std::uint32_t word = tile[word_at(k, lane)];
      if constexpr (whole) {
        *reinterpret_cast<std::uint32_t*>(out) = word;
      } else {
        for (unsigned r = 0; r < kFp8Rows && row + r < rows; ++r) {
          out[r] = static_cast<std::uint8_t>(word >> (8 * r));
        }
      }
    }
    __syncthreads();  // the reduction uses the tile's memory
  }
  largest = block_reduce<kFp8Threads>(largest, Larger{}, shared);
  if (threadIdx.x == 0) {
    raise_to(amax, largest);
  }
}

}  // namespace mlr1
