// Kernels of mlr1::qk_norm_rope and mlr1::qk_norm_rope_backward.
//
// Bound by memory: forward reads and writes a fused row once; backward reads the gradients and the
// turned heads and writes the row's gradient once. A warp takes a token, and as many of its heads at
// a time as fill its 32 lanes: four of 64 numbers in bf16, of which each lane holds eight. Every
// angle's cosine and sine are computed once a token, each by one lane, and handed around.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/vector.h"
#include "qk_norm_rope.h"

namespace mlr1 {

constexpr int kQkTokens = 8;  // of a block of kWarp x kQkTokens threads

// What does not depend on the tensors' type.
struct QkTokens {
  HeadLayout layout;
  int lanes;               // of a head: a power of two, at most 32
  std::int64_t tokens;
  std::int64_t repeats;    // tokens of one position: sequences of the batch
  const float* angles;     // [positions, width / 2]
  std::int64_t positions;
  std::int64_t angles_row;     // stride
  std::int64_t angles_column;  // stride
  const std::int32_t* bounds;  // null where positions do not begin anew
  std::int64_t num_bounds;
};

template <typename scalar_t>
struct QkHeads {
  scalar_t* q;
  scalar_t* k;
  scalar_t* v;

  MLR1_HOST_DEVICE scalar_t* at(const HeadCursor& head, const HeadLayout& layout,
                                std::int64_t token) const {
    const Kind kind = head.kind(layout);
    scalar_t* const begin = kind == Kind::kQuery ? q : kind == Kind::kKey ? k : v;
    return begin + head.of_kind(layout, token) * layout.width;
  }
};

// What one lane holds of a head: vector c * lanes + (lane % lanes) for c = 0, 1, ...
template <typename scalar_t, int kVector, int kChunks>
struct HeadPart {
  Vector<scalar_t, kVector> at[kChunks];
};

template <int kVector, int kChunks, typename scalar_t>
__device__ inline HeadPart<scalar_t, kVector, kChunks> load_part(const scalar_t* head,
                                                                 const QkTokens& shape) {
  using vector_t = Vector<scalar_t, kVector>;
  const int vectors = shape.layout.width / kVector;
  HeadPart<scalar_t, kVector, kChunks> part = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int index = c * shape.lanes + threadIdx.x % shape.lanes;
    if (head != nullptr && index < vectors) {
      part.at[c] = load_streaming(reinterpret_cast<const vector_t*>(head) + index);
    }
  }
  return part;
}

template <typename scalar_t, int kVector, int kChunks>
__device__ inline void store_part(scalar_t* head,
                                  const HeadPart<scalar_t, kVector, kChunks>& part,
                                  const QkTokens& shape) {
  using vector_t = Vector<scalar_t, kVector>;
  const int vectors = shape.layout.width / kVector;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int index = c * shape.lanes + threadIdx.x % shape.lanes;
    if (index < vectors) {
      reinterpret_cast<vector_t*>(head)[index] = part.at[c];
    }
  }
}

// Sum over the lanes of a head, with the same bits in each.
template <typename T>
__device__ inline T sum_of_head(T value, int lanes) {
  for (int step = 1; step < lanes; step *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// The turns of the pairs that a lane holds.
template <typename T, int kVector, int kChunks>
struct PartTurns {
  static constexpr int kPairs = kVector / 2;
  Turn<T> at[kChunks][kPairs];

  __device__ PartTurns(const QkTokens& shape, std::int64_t token) {
    const std::int64_t row = token / shape.repeats;
    const std::int64_t position =
        shape.bounds == nullptr ? row
                                : position_in_document(shape.bounds, shape.num_bounds, row);
    CUDA_KERNEL_ASSERT(position < shape.positions);
    const float* const angles = shape.angles + position * shape.angles_row;
    const int lane = threadIdx.x, pairs = shape.layout.width / 2;
#pragma unroll 1
    for (int begin = 0; begin < pairs; begin += kWarp) {
      const int pair = begin + lane;
      const Turn<T> mine =
          turn_by<T>(pair < pairs ? angles[pair * shape.angles_column] : 0.0f);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int wanted = (c * shape.lanes + lane % shape.lanes) * kPairs + i - begin;
          const Turn<T> other = {__shfl_sync(kAllLanes, mine.cos, wanted & (kWarp - 1)),
                                 __shfl_sync(kAllLanes, mine.sin, wanted & (kWarp - 1))};
          if (wanted >= 0 && wanted < static_cast<int>(kWarp)) {
            at[c][i] = other;
          }
        }
      }
    }
  }
};

template <typename scalar_t, int kVector, int kChunks>
__global__ void __launch_bounds__(kWarp* kQkTokens)
    qk_norm_rope_kernel(const scalar_t* __restrict__ qkv, QkHeads<scalar_t> heads,
                        wide_t<scalar_t>* __restrict__ scales, wide_t<scalar_t> eps,
                        QkTokens shape) {
  using math_t = wide_t<scalar_t>;
  const std::int64_t token = std::int64_t(blockIdx.x) * kQkTokens + threadIdx.y;
  if (token >= shape.tokens) {
    return;
  }
  const HeadLayout& layout = shape.layout;
  const int num_heads = layout.heads(), at_once = static_cast<int>(kWarp) / shape.lanes;
  const scalar_t* const row = qkv + token * num_heads * layout.width;
  const auto load = [&](int number) {
    const scalar_t* const head =
        number < num_heads ? row + std::int64_t{number} * layout.width : nullptr;
    return load_part<kVector, kChunks>(head, shape);
  };
  HeadCursor head{0, 0, 0};
  head.advance(threadIdx.x / shape.lanes, layout);
  auto next = load(head.number);
  const PartTurns<math_t, kVector, kChunks> turns(shape, token);
  for (int first = 0; first < num_heads; first += at_once, head.advance(at_once, layout)) {
    auto part = next;
    next = load(head.number + at_once);
    math_t sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const math_t x = part.at[c].at[i];
        sum += x * x;
      }
    }
    sum = sum_of_head(sum, shape.lanes);
    if (head.number >= num_heads) {
      continue;
    }
    if (head.kind(layout) != Kind::kValue) {
      const math_t scale = inverse_root(sum / static_cast<math_t>(layout.width) + eps);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
          const auto y = turn<math_t>({scale * static_cast<math_t>(part.at[c].at[2 * i]),
                                       scale * static_cast<math_t>(part.at[c].at[2 * i + 1])},
                                      turns.at[c][i]);
          part.at[c].at[2 * i] = static_cast<scalar_t>(y.even);
          part.at[c].at[2 * i + 1] = static_cast<scalar_t>(y.odd);
        }
      }
      if (threadIdx.x % shape.lanes == 0) {
        scales[head.scale(layout, token)] = scale;
      }
    }
    store_part(heads.at(head, layout, token), part, shape);
  }
}

// Three blocks a multiprocessor have loads enough in flight; for four, registers would be spilled.
template <typename scalar_t, int kVector, int kChunks>
__global__ void __launch_bounds__(kWarp* kQkTokens, kChunks == 1 ? 3 : 1)
    qk_norm_rope_backward_kernel(QkHeads<const scalar_t> grads, QkHeads<const scalar_t> outs,
                                 const wide_t<scalar_t>* __restrict__ scales,
                                 scalar_t* __restrict__ grad_in, QkTokens shape) {
  using math_t = wide_t<scalar_t>;
  using part_t = HeadPart<scalar_t, kVector, kChunks>;
  struct Loaded {
    part_t grad;
    part_t out;
    math_t scale;
  };
  const std::int64_t token = std::int64_t(blockIdx.x) * kQkTokens + threadIdx.y;
  if (token >= shape.tokens) {
    return;
  }
  const HeadLayout& layout = shape.layout;
  const int num_heads = layout.heads(), at_once = static_cast<int>(kWarp) / shape.lanes;
  scalar_t* const row = grad_in + token * num_heads * layout.width;
  const auto load = [&](const HeadCursor& head) {
    const bool there = head.number < num_heads;
    const bool turned = there && head.kind(layout) != Kind::kValue;
    return Loaded{
        load_part<kVector, kChunks>(there ? grads.at(head, layout, token) : nullptr, shape),
        load_part<kVector, kChunks>(turned ? outs.at(head, layout, token) : nullptr, shape),
        turned ? scales[head.scale(layout, token)] : math_t(0)};
  };
  HeadCursor head{0, 0, 0};
  head.advance(threadIdx.x / shape.lanes, layout);
  Loaded next = load(head);
  const PartTurns<math_t, kVector, kChunks> turns(shape, token);
  for (int first = 0; first < num_heads; first += at_once) {
    Loaded now = next;
    const HeadCursor here = head;
    head.advance(at_once, layout);
    next = load(head);
    math_t sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum += static_cast<math_t>(now.grad.at[c].at[i]) * static_cast<math_t>(now.out.at[c].at[i]);
      }
    }
    const math_t mean = sum_of_head(sum, shape.lanes) / static_cast<math_t>(layout.width);
    if (here.number >= num_heads) {
      continue;
    }
    if (here.kind(layout) != Kind::kValue) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
          auto& even = now.grad.at[c].at[2 * i];
          auto& odd = now.grad.at[c].at[2 * i + 1];
          const auto dx = qk_norm_rope_gradient<math_t>(
              {static_cast<math_t>(even), static_cast<math_t>(odd)},
              {static_cast<math_t>(now.out.at[c].at[2 * i]),
               static_cast<math_t>(now.out.at[c].at[2 * i + 1])},
              mean, now.scale, turns.at[c][i]);
          even = static_cast<scalar_t>(dx.even);
          odd = static_cast<scalar_t>(dx.odd);
        }
      }
    }
    store_part(row + std::int64_t{here.number} * layout.width, now.grad, shape);
  }
}

// Says in `shape` how a head lies in a warp, and calls run(numbers of a vector, vectors of a lane) with
// the kernel's constants: vectors of 16 bytes where heads are made of them, else of two numbers.
template <typename scalar_t, typename Run>
void with_head_split(QkTokens& shape, const Run& run) {
  constexpr int kVector = kVectorBytes / sizeof(scalar_t), kFew = 1, kMany = 4;
  const bool wide = shape.layout.width % kVector == 0;
  const int vectors = shape.layout.width / (wide ? kVector : 2);
  const bool few = wide && vectors <= static_cast<int>(kWarp);
  for (shape.lanes = 1; shape.lanes * (few ? kFew : kMany) < vectors;) {
    shape.lanes *= 2;
  }
  if (few) {
    run(std::integral_constant<int, kVector>{}, std::integral_constant<int, kFew>{});
  } else if (wide) {
    run(std::integral_constant<int, kVector>{}, std::integral_constant<int, kMany>{});
  } else {
    run(std::integral_constant<int, 2>{}, std::integral_constant<int, kMany>{});
  }
}

}  // namespace mlr1
