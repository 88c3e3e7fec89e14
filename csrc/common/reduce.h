// Reductions over a warp, a block and a cluster. The order is fixed and nothing is atomic, so the
// same values give the same bits on every run, and every thread gets the same bits.
//
// `merge(a, b)` takes and gives a T, any struct of 4-byte words; it must be associative up to
// rounding, and it is always given the value of the lower threads first. A merge that has a shorter
// way over groups of lanes than pair by pair has, in place of that, over_lanes<width>(value), and
// none(): a T that changes nothing.
#pragma once

#include <type_traits>
#include <utility>

#include "common/device.h"
#include "common/math.h"

namespace mlr1 {

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return larger(a, b);
  }
};

template <typename Merge, typename = void>
constexpr bool kKnowsLanes = false;
template <typename Merge>
constexpr bool kKnowsLanes<Merge, std::void_t<decltype(std::declval<const Merge&>().none())>> =
    true;

template <typename T>
__device__ inline T exchange_xor(const T& value, unsigned lanes) {
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "shuffles move words of 4 bytes");
  unsigned words[sizeof(T) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) {
    word = __shfl_xor_sync(kAllLanes, word, lanes);
  }
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// Over groups of `width` neighbouring lanes, a power of two.
template <unsigned width = kWarp, typename T, typename Merge>
__device__ inline T warp_reduce(T value, const Merge& merge) {
  static_assert(width >= 1 && width <= kWarp && (width & (width - 1)) == 0, "a power of two");
  if constexpr (kKnowsLanes<Merge>) {
    return merge.template over_lanes<width>(value);
  } else {
#pragma unroll
    for (unsigned lanes = 1; lanes < width; lanes *= 2) {
      const T other = exchange_xor(value, lanes);
      value = (threadIdx.x & lanes) ? merge(other, value) : merge(value, other);
    }
    return value;
  }
}

// Bytes of shared memory that block_reduce() of a T needs.
template <typename T, unsigned threads>
constexpr std::size_t kReduceBytes = sizeof(T) * (threads / kWarp);

// Over all threads of a block of `threads` x 1 x 1, a power of two; where kForFirst, for its first warp
// alone, and what others get has no meaning. `scratch` has kReduceBytes, aligned for T. Behind it all
// see what was written to shared memory, and scratch may be used again, where kForFirst behind another
// barrier only.
template <unsigned threads, bool kForFirst = false, typename T, typename Merge>
__device__ inline T block_reduce(T value, const Merge& merge, void* scratch) {
  constexpr unsigned kWarps = threads / kWarp;
  static_assert(threads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0,
                "1, 2, 4, .. 32 warps");
  T* const of_warp = static_cast<T*>(scratch);
  value = warp_reduce(value, merge);
  if (threadIdx.x % kWarp == 0) {
    of_warp[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  if (!kForFirst || threadIdx.x < kWarp) {
    value = warp_reduce<kWarps>(of_warp[threadIdx.x % kWarps], merge);
  }
  if constexpr (!kForFirst) {
    __syncthreads();
  }
  return value;
}

// Bytes of shared memory that cluster_reduce() of a T needs: a place for each block.
constexpr unsigned kMostBlocks = 16;
template <typename T>
constexpr std::size_t kClusterReduceBytes = sizeof(T) * kMostBlocks;

// Over the blocks of a cluster, of a value that all threads of a block have; where kForFirst, its first
// warp, for first warps alone. Every block must have started (cluster_sync() once before). `scratch` has
// kClusterReduceBytes, aligned for T; it may be used again after another barrier of the cluster. Blocks
// may end behind it.
template <bool kForFirst = false, typename T, typename Merge>
__device__ inline T cluster_reduce(T value, const Merge& merge, void* scratch) {
  T* const of_rank = static_cast<T*>(scratch);
  if (threadIdx.x < cluster_size()) {
    *cluster_shared(of_rank + cluster_rank(), threadIdx.x) = value;
  }
  cluster_sync();
  if (kForFirst && threadIdx.x >= kWarp) {
    return value;
  }
  if constexpr (kKnowsLanes<Merge>) {
    const unsigned rank = threadIdx.x % kMostBlocks;
    return warp_reduce<kMostBlocks>(rank < cluster_size() ? of_rank[rank] : merge.none(), merge);
  } else {
    value = of_rank[0];
    for (unsigned rank = 1; rank < cluster_size(); ++rank) {
      value = merge(value, of_rank[rank]);
    }
    return value;
  }
}

}  // namespace mlr1
