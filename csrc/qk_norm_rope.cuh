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
#include "common/packed.h"
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
  scalar_t* v;  // null where there are none

  // The heads of one token, from `place` in each on.
  __device__ QkHeads of_token(const HeadLayout& layout, std::int64_t token, int place) const {
    const std::int64_t queries = token * layout.query_heads() * layout.width + place;
    const std::int64_t pairs = token * layout.groups * layout.width + place;
    return {q + queries, k + pairs, v == nullptr ? v : v + pairs};
  }

  // A head of the heads of one token.
  __device__ scalar_t* at(const HeadCursor& head, const HeadLayout& layout) const {
    const Kind kind = head.kind(layout);
    scalar_t* const begin = kind == Kind::kQuery ? q : kind == Kind::kKey ? k : v;
    return begin + static_cast<int>(head.of_kind(layout, 0)) * layout.width;
  }
};

// The layout and the lanes of a head, of which a compiler knows more where it knows the width: then
// kChunks vectors of kVector numbers in each lane are a head.
template <int kVector, int kChunks, int kWidth>
struct HeadSplit {
  HeadLayout layout;
  int lanes;

  __device__ explicit HeadSplit(const QkTokens& shape) : layout(shape.layout), lanes(shape.lanes) {
    if constexpr (kWidth > 0) {
      layout.width = kWidth;
      lanes = kWidth / kVector / kChunks;
    }
  }
  __device__ int at_once() const { return static_cast<int>(kWarp) / lanes; }
  // This thread's lane of a head, where its numbers begin, and whether it has a vector number c.
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % lanes; }
  __device__ int begin() const { return lane() * kVector; }
  __device__ bool has(int c) const { return (c * lanes + lane()) * kVector < layout.width; }
  // Its head of those that a warp takes at a time.
  __device__ int head() const { return static_cast<int>(threadIdx.x) / lanes; }
};

// What one lane holds of a head: vector c * lanes + its own number for c = 0, 1, ...
template <typename scalar_t, int kVector, int kChunks>
struct HeadPart {
  Packed<Vector<scalar_t, kVector>> at[kChunks];
};

// `begin` is where this lane's numbers of the head begin.
template <typename scalar_t, int kVector, int kChunks, int kWidth>
__device__ inline HeadPart<scalar_t, kVector, kChunks> load_part(
    const scalar_t* begin, bool is_there, const HeadSplit<kVector, kChunks, kWidth>& split) {
  HeadPart<scalar_t, kVector, kChunks> part = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (is_there && split.has(c)) {
      part.at[c] = packed_seen_once<kVector>(begin + c * split.lanes * kVector);
    }
  }
  return part;
}

template <typename scalar_t, int kVector, int kChunks, int kWidth>
__device__ inline void store_part(scalar_t* begin,
                                  const HeadPart<scalar_t, kVector, kChunks>& part,
                                  const HeadSplit<kVector, kChunks, kWidth>& split) {
  using packed_t = Packed<Vector<scalar_t, kVector>>;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (split.has(c)) {
      store_whole(reinterpret_cast<packed_t*>(begin + c * split.lanes * kVector), part.at[c]);
    }
  }
}

// The numbers of a part in the type of the arithmetic.
template <typename T, int kCount>
struct Numbers {
  T at[kCount];

  template <typename scalar_t, int kVector, int kChunks>
  __device__ explicit Numbers(const HeadPart<scalar_t, kVector, kChunks>& part) {
    static_assert(kCount == kVector * kChunks);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto vector = widened(part.at[c]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        at[c * kVector + i] = vector.at[i];
      }
    }
  }

  __device__ Pair<T> pair(int i) const { return {at[2 * i], at[2 * i + 1]}; }
};

// Stores a head of which pair(i) gives this lane's pairs.
template <typename scalar_t, int kVector, int kChunks, int kWidth, typename Made>
__device__ inline void store_pairs(scalar_t* begin, const Made& pair,
                                   const HeadSplit<kVector, kChunks, kWidth>& split) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Vector<scalar_t, kVector> made;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const auto numbers = pair(c * (kVector / 2) + i);
      made.at[2 * i] = static_cast<scalar_t>(numbers.even);
      made.at[2 * i + 1] = static_cast<scalar_t>(numbers.odd);
    }
    if (split.has(c)) {
      store_whole(
          reinterpret_cast<Vector<scalar_t, kVector>*>(begin + c * split.lanes * kVector), made);
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
template <typename T, int kVector, int kChunks, int kWidth>
struct PartTurns {
  static constexpr int kPairs = kVector / 2;
  Turn<T> at[kChunks * kPairs];

  __device__ PartTurns(const QkTokens& shape, const HeadSplit<kVector, kChunks, kWidth>& split,
                       std::int64_t token) {
    const std::int64_t row = token / shape.repeats;
    const std::int64_t position =
        shape.bounds == nullptr ? row
                                : position_in_document(shape.bounds, shape.num_bounds, row);
    CUDA_KERNEL_ASSERT(position < shape.positions);
    const float* const angles = shape.angles + position * shape.angles_row;
    const int lane = threadIdx.x, pairs = split.layout.width / 2;
#pragma unroll 1
    for (int begin = 0; begin < pairs; begin += kWarp) {
      const int pair = begin + lane;
      const Turn<T> mine =
          turn_by<T>(pair < pairs ? angles[pair * shape.angles_column] : 0.0f);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int wanted = (c * split.lanes + split.lane()) * kPairs + i - begin;
          const Turn<T> other = {__shfl_sync(kAllLanes, mine.cos, wanted & (kWarp - 1)),
                                 __shfl_sync(kAllLanes, mine.sin, wanted & (kWarp - 1))};
          if (wanted >= 0 && wanted < static_cast<int>(kWarp)) {
            at[c * kPairs + i] = other;
          }
        }
      }
    }
  }
};

template <typename scalar_t, int kVector, int kChunks, int kWidth>
__global__ void __launch_bounds__(kWarp* kQkTokens)
    qk_norm_rope_kernel(const scalar_t* __restrict__ qkv, QkHeads<scalar_t> heads,
                        wide_t<scalar_t>* __restrict__ scales, wide_t<scalar_t> eps,
                        QkTokens shape) {
  using math_t = wide_t<scalar_t>;
  using numbers_t = Numbers<math_t, kVector * kChunks>;
  const std::int64_t token = std::int64_t(blockIdx.x) * kQkTokens + threadIdx.y;
  if (token >= shape.tokens) {
    return;
  }
  const HeadSplit<kVector, kChunks, kWidth> split(shape);
  const HeadLayout& layout = split.layout;
  const int num_heads = layout.heads(), at_once = split.at_once();
  HeadCursor head{0, 0, 0};
  head.advance(split.head(), layout);
  const scalar_t* from = qkv + (token * num_heads + head.number) * layout.width + split.begin();
  auto next = load_part(from, head.number < num_heads, split);
  const QkHeads<scalar_t> out = heads.of_token(layout, token, split.begin());
  math_t* const out_scales = scales + token * layout.scaled_heads();
  const math_t share = math_t(1) / static_cast<math_t>(layout.width);
  const PartTurns<math_t, kVector, kChunks, kWidth> turns(shape, split, token);
  for (int first = 0; first < num_heads; first += at_once, head.advance(at_once, layout)) {
    const auto part = next;
    from += at_once * layout.width;
    next = load_part(from, head.number + at_once < num_heads, split);
    const numbers_t x(part);
    math_t sum = 0;
#pragma unroll
    for (const math_t number : x.at) {
      sum += number * number;
    }
    sum = sum_of_head(sum, split.lanes);
    if (head.number >= num_heads) {
      continue;
    }
    scalar_t* const to = out.at(head, layout);
    if (head.kind(layout) == Kind::kValue) {
      store_part(to, part, split);
      continue;
    }
    const math_t scale = inverse_root(sum * share + eps);
    store_pairs(
        to,
        [&](int i) {
          const auto pair = x.pair(i);
          return turn<math_t>({scale * pair.even, scale * pair.odd}, turns.at[i]);
        },
        split);
    if (split.lane() == 0) {
      out_scales[head.scale(layout, 0)] = scale;
    }
  }
}

// Three blocks a multiprocessor have loads enough in flight; for four, registers would be spilled.
template <typename scalar_t, int kVector, int kChunks, int kWidth>
__global__ void __launch_bounds__(kWarp* kQkTokens, kChunks == 1 ? 3 : 1)
    qk_norm_rope_backward_kernel(QkHeads<const scalar_t> grads, QkHeads<const scalar_t> outs,
                                 const wide_t<scalar_t>* __restrict__ scales,
                                 scalar_t* __restrict__ grad_in, QkTokens shape) {
  using math_t = wide_t<scalar_t>;
  using numbers_t = Numbers<math_t, kVector * kChunks>;
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
  const HeadSplit<kVector, kChunks, kWidth> split(shape);
  const HeadLayout& layout = split.layout;
  const int num_heads = layout.heads(), at_once = split.at_once();
  const QkHeads<const scalar_t> grad = grads.of_token(layout, token, split.begin());
  const QkHeads<const scalar_t> out = outs.of_token(layout, token, split.begin());
  const math_t* const in_scales = scales + token * layout.scaled_heads();
  const auto load = [&](const HeadCursor& head) {
    const bool there = head.number < num_heads;
    const bool turned = there && head.kind(layout) != Kind::kValue;
    return Loaded{load_part(grad.at(head, layout), there, split),
                  load_part(turned ? out.at(head, layout) : nullptr, turned, split),
                  turned ? in_scales[head.scale(layout, 0)] : math_t(0)};
  };
  HeadCursor head{0, 0, 0};
  head.advance(split.head(), layout);
  scalar_t* to = grad_in + (token * num_heads + head.number) * layout.width + split.begin();
  Loaded next = load(head);
  const math_t share = math_t(1) / static_cast<math_t>(layout.width);
  const PartTurns<math_t, kVector, kChunks, kWidth> turns(shape, split, token);
  for (int first = 0; first < num_heads; first += at_once, to += at_once * layout.width) {
    const Loaded now = next;
    const HeadCursor here = head;
    head.advance(at_once, layout);
    next = load(head);
    const numbers_t dy(now.grad), y(now.out);
    math_t sum = 0;
#pragma unroll
    for (int i = 0; i < kVector * kChunks; ++i) {
      sum += dy.at[i] * y.at[i];
    }
    const math_t mean = sum_of_head(sum, split.lanes) * share;
    if (here.number >= num_heads) {
      continue;
    }
    if (here.kind(layout) == Kind::kValue) {
      store_part(to, now.grad, split);
      continue;
    }
    store_pairs(
        to,
        [&](int i) {
          return qk_norm_rope_gradient<math_t>(dy.pair(i), y.pair(i), mean, now.scale,
                                               turns.at[i]);
        },
        split);
  }
}

// Says in `shape` how a head lies in a warp, and calls run(numbers of a vector, vectors of a lane,
// width of a head or 0) with the kernel's constants: vectors of 16 bytes where heads are made of
// them, else of two numbers. Of the width the compiler knows what the models have, 64 in 2 bytes.
template <typename scalar_t, typename Run>
void with_head_split(QkTokens& shape, const Run& run) {
  constexpr int kVector = kVectorBytes / sizeof(scalar_t), kFew = 1, kMany = 4;
  constexpr int kUsual = sizeof(scalar_t) == 2 ? 64 : 0;
  const bool wide = shape.layout.width % kVector == 0;
  const int vectors = shape.layout.width / (wide ? kVector : 2);
  const bool few = wide && vectors <= static_cast<int>(kWarp);
  for (shape.lanes = 1; shape.lanes * (few ? kFew : kMany) < vectors;) {
    shape.lanes *= 2;
  }
  using std::integral_constant;
  if (shape.layout.width == kUsual) {
    run(integral_constant<int, kVector>{}, integral_constant<int, kFew>{},
        integral_constant<int, kUsual>{});
  } else if (few) {
    run(integral_constant<int, kVector>{}, integral_constant<int, kFew>{},
        integral_constant<int, 0>{});
  } else if (wide) {
    run(integral_constant<int, kVector>{}, integral_constant<int, kMany>{},
        integral_constant<int, 0>{});
  } else {
    run(integral_constant<int, 2>{}, integral_constant<int, kMany>{},
        integral_constant<int, 0>{});
  }
}

}  // namespace mlr1
