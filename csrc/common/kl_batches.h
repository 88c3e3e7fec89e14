// How kernels of distillation sum over pairs of vectors of logits, z of the student and t of the teacher,
// and over the sums of a warp's lanes.
#pragma once

#include <climits>

#include "common/device.h"
#include "common/kl_sums.h"
#include "common/packed.h"
#include "common/reduce.h"
#include "common/row_walks.h"

namespace mlr1 {

struct Smallest {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

// Finds the tops of the lanes first, so that each makes its sums relative to them once.
template <bool kHot, bool kReverse, typename T>
struct MergeKlSums {
  T inverse_temperature;

  __device__ KlSums<T> none() const { return no_kl_sums<T>(); }

  template <unsigned width>
  __device__ KlSums<T> over_lanes(KlSums<T> sums) const {
    const T top_z = warp_reduce<width>(sums.top_z, Largest{});
    const T top_t = warp_reduce<width>(sums.top_t, Largest{});
    sums.first = warp_reduce<width>(sums.top_t == top_t ? sums.first : INT_MAX, Smallest{});
    raise_kl_tops<kHot, kReverse>(sums, top_z, top_t, inverse_temperature);
    sums.q = warp_reduce<width>(sums.q, Add{});
    sums.p = warp_reduce<width>(sums.p, Add{});
    if constexpr (kHot) {
      sums.q_hot = warp_reduce<width>(sums.q_hot, Add{});
      sums.p_hot = warp_reduce<width>(sums.p_hot, Add{});
    }
    sums.cross = warp_reduce<width>(sums.cross, Add{});
    sums.spread = warp_reduce<width>(sums.spread, Add{});
    return sums;
  }
};

// A pair of vectors in the type of the arithmetic.
template <typename T, int kVector>
struct WidePair {
  Vector<T, kVector> z;
  Vector<T, kVector> t;
};

template <typename scalar_t, int kVector>
__device__ inline WidePair<wide_t<scalar_t>, kVector> widened(
    const VectorPair<scalar_t, kVector>& pair) {
  return {widened(pair.z), widened(pair.t)};
}

// Adds what walk_pair() has loaded to sums, but that `first` is the first column of the vector that has
// it; sums are made relative to larger tops once, where one of the two rises.
template <bool kHot, bool kReverse, typename scalar_t, int kVector, int kMany>
__device__ inline void add_kl_batch(KlSums<wide_t<scalar_t>>& sums, int column, int stride, int end,
                                    const VectorPair<scalar_t, kVector> (&pairs)[kMany],
                                    wide_t<scalar_t> inverse_temperature) {
  using math_t = wide_t<scalar_t>;
  using packed_t = Packed<Vector<scalar_t, kVector>>;
  packed_t of_z[kMany];
  math_t top_t = sums.top_t;
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    of_z[u] = pairs[u].z;
    const packed_t of_t[1] = {pairs[u].t};
    const math_t top = largest_of(top_t, of_t);
    sums.first = top > top_t ? column + u * stride : sums.first;
    top_t = top;
  }
  const math_t top_z = largest_of(sums.top_z, of_z);
  if (top_z > sums.top_z || top_t > sums.top_t) {
    raise_kl_tops<kHot, kReverse>(sums, top_z, top_t, inverse_temperature);
  }
  const math_t origin_z = origin_of_powers(top_z);
  const math_t origin_t = origin_of_powers(top_t);
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    if (u == 0 || column + u * stride < end) {
      const auto [z, t] = widened(pairs[u]);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        add_kl_terms<kHot>(sums, kl_terms<kHot, kReverse>(z.at[k], t.at[k], origin_z, origin_t,
                                                          inverse_temperature));
      }
    }
  }
}

// The first column of a vector of the teacher's logits that has its row's or thread's largest.
template <typename scalar_t, int kVector>
__device__ inline int first_column(int column, const Packed<Vector<scalar_t, kVector>>& packed,
                                   wide_t<scalar_t> top_t) {
  const auto t = widened(packed);
  int first = column;
#pragma unroll
  for (int k = kVector - 1; k >= 0; --k) {
    first = t.at[k] == top_t ? column + k : first;
  }
  return first;
}

}  // namespace mlr1
