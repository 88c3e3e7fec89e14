// How the threads of a block walk over a row of logits, or over two together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/packed.h"
#include "common/vector.h"

namespace mlr1 {

template <typename scalar_t, int kVector>
struct VectorPair {
  Packed<Vector<scalar_t, kVector>> z;
  Packed<Vector<scalar_t, kVector>> t;
};

// A function that loads the vectors of both rows from a column on.
template <int kVector, typename scalar_t>
__device__ inline auto loads_of(const scalar_t* z, const scalar_t* t) {
  return [=](int column) {
    return VectorPair<scalar_t, kVector>{packed_at<kVector>(z + column),
                                         packed_at<kVector>(t + column)};
  };
}

// Calls visit(column, stride, loaded) for this thread's columns of [begin, end), in ascending order:
// loaded[0] .. loaded[kMany - 1] are what load gives of the vectors of both that begin at `column`,
// column + stride, .. ; they are under way together. Of columns that are not there it has loaded[0].
template <int kVector, unsigned kThreads, int kMany, typename Load, typename Visit>
__device__ inline void walk_pair(int begin, int end, const Load& load, const Visit& visit) {
  constexpr int kStride = static_cast<int>(kThreads) * kVector;
  using Loaded = decltype(load(0));
  int column = begin + static_cast<int>(threadIdx.x) * kVector;
  for (; column < end; column += kMany * kStride) {
    Loaded loaded[kMany];
    loaded[0] = load(column);
#pragma unroll
    for (int u = 1; u < kMany; ++u) {
      loaded[u] = loaded[0];
      if (column + u * kStride < end) {
        loaded[u] = load(column + u * kStride);
      }
    }
    visit(column, kStride, loaded);
  }
}

// Overwrites columns of a row by what element(column, k, load(first column of the vector)) makes,
// in out_t: the row's own type, or a narrower one in the first part of its memory. All threads of a
// block of kThreads; `reads` is whether `load` reads the row.
//
// Where it does not, the block walks over its columns tile by tile from back to front: what was
// read last is likeliest to be in a cache. Where it does, from front to back, and start is 0. There
// a narrower tile lies where tiles of at most half its number were: before they are overwritten,
// all threads must have read them, and a barrier behind the loads of tiles 0, 1, 2, 4, 8 ... sees
// to that.
template <typename out_t, int kVector, unsigned kThreads, int kUnrolled, typename scalar_t,
          typename Load, typename Element>
__device__ inline void overwrite_columns(scalar_t* row, int start, int end, bool reads,
                                         const Load& load, const Element& element) {
  constexpr int kTile = static_cast<int>(kThreads) * kVector * kUnrolled;
  using Loaded = decltype(load(0));
  auto* const out = reinterpret_cast<out_t*>(row);
  const int tiles = start < end ? (end - start + kTile - 1) / kTile : 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = start + (reads ? tile : tiles - 1 - tile) * kTile;
    const int first = begin + static_cast<int>(threadIdx.x) * kVector;
    Loaded loaded[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int column = first + u * static_cast<int>(kThreads) * kVector;
      if (column < end) {
        loaded[u] = load(column);
      }
    }
    if (!std::is_same_v<scalar_t, out_t> && reads && (tile & (tile - 1)) == 0) {
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int column = first + u * static_cast<int>(kThreads) * kVector;
      if (column < end) {
        const auto wide = widened(loaded[u]);
        Vector<out_t, kVector> made;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          made.at[k] = static_cast<out_t>(element(column + k, k, wide));
        }
        store_streaming(reinterpret_cast<Vector<out_t, kVector>*>(out + column), made);
      }
    }
  }
}

// Vectors that a thread loads before it overwrites them.
template <typename scalar_t, int kVector>
constexpr int kLoadedAtOnce = sizeof(scalar_t) * kVector < kVectorBytes ? 4 : 2;

}  // namespace mlr1
