// What the CPU rows of distillation share: blocks of a row of logits, and lanes of a block.
//
// A row belongs to one thread, so the number of threads changes no bit. It is taken in blocks that
// stay in the first-level cache, a block in lanes that compilers turn into vectors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/cpu.h"
#include "common/math.h"

// Within a function of `MLR1_EVERY_X86` only what is inlined is compiled for its machines, and a
// loop with a call in it never becomes vectors.
#define MLR1_INLINES __attribute__((always_inline))
#define MLR1_INLINE MLR1_INLINES inline
#define MLR1_INLINES_ALL __attribute__((flatten))

// Calls body(i, k) for every element i + k of a block, k being its lane.
#define MLR1_FOR_LANES(count, body)                                      \
  {                                                                      \
    int64_t first = 0;                                                   \
    for (; first + kLanes <= (count); first += kLanes) {                 \
      _Pragma("omp simd") for (int lane = 0; lane < kLanes; ++lane) {    \
        body(first, lane);                                               \
      }                                                                  \
    }                                                                    \
    for (int lane = 0; first + lane < (count); ++lane) {                 \
      body(first, lane);                                                 \
    }                                                                    \
  }

namespace mlr1 {

constexpr int64_t kBlock = 1024;
constexpr int kLanes = 16;

// Elements of one block.
template <typename T>
struct Block {
  alignas(64) T at[kBlock];
};

// Sums of the elements 0, 16, 32 ... of a block, of 1, 17, 33 ... and so on.
template <typename T>
struct Lanes {
  alignas(64) T at[kLanes] = {};

  MLR1_INLINE T sum() const {
    T half[kLanes / 2];
    for (int k = 0; k < kLanes / 2; ++k) {
      half[k] = at[k] + at[k + kLanes / 2];
    }
    T total = half[0];
    for (int k = 1; k < kLanes / 2; ++k) {
      total += half[k];
    }
    return total;
  }
};

// The largest element; -inf of none.
template <typename T>
MLR1_INLINE T top_of_block(const T* x, int64_t count) {
  alignas(64) T top[kLanes];
  std::fill(top, top + kLanes, -std::numeric_limits<T>::infinity());
  const auto raise = [&](int64_t i, int k) MLR1_INLINES { top[k] = larger(top[k], x[i + k]); };
  MLR1_FOR_LANES(count, raise)
  return *std::max_element(top, top + kLanes);
}

// Gives a block in the type of the arithmetic: itself, or a copy in `room`.
template <typename T, typename scalar_t>
const T* widen(const scalar_t* x, int64_t count, Block<T>& room) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    return x;
  } else {
    std::copy(x, x + count, room.at);
    return room.at;
  }
}

template <typename T, typename out_t>
void narrow(const T* x, int64_t count, out_t* out) {
  if constexpr (std::is_same_v<T, out_t>) {
    std::memcpy(out, x, count * sizeof(T));
  } else {
    std::transform(x, x + count, out, [](T value) { return static_cast<out_t>(value); });
  }
}

// Calls block(first column, columns) for the blocks of a row.
template <typename Function>
void for_each_block(int64_t width, const Function& block) {
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    block(begin, std::min(kBlock, width - begin));
  }
}

// Calls row(number) for the rows of logits, shared among the threads.
template <typename Function>
void share_rows(const at::Tensor& logits, const Function& row) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(logits.size(1), 1), 1);
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      row(at);
    }
  });
}

}  // namespace mlr1
