// Kernels of mlr1::kl_partials, jsd_partials and kl_gradient_.
//
// Bound by memory: each logit of student and teacher is read once, and of the student written once
// by the gradient. A block takes one row; its threads take neighbouring vectors of 16 bytes, and
// ask for the next ones before they reckon with those at hand.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "kl_rows.h"

namespace mlr1 {

constexpr int kKlThreads = 512;
// Blocks that a multiprocessor holds at least, so that a thread has 64 registers; in fp64, 128.
template <typename scalar_t>
constexpr int kKlBlocks = sizeof(scalar_t) == sizeof(double) ? 1 : 2;

template <bool kHot, bool kReverse, typename T>
struct MergeKlSums {
  T inverse_temperature;

  MLR1_HOST_DEVICE KlSums<T> operator()(const KlSums<T>& a, const KlSums<T>& b) const {
    return merged_kl_sums<kHot, kReverse>(a, b, inverse_temperature);
  }
};

template <typename T, int count>
struct WidePair {
  T z[count];
  T t[count];
};

template <int kVector, typename scalar_t>
__device__ inline WidePair<wide_t<scalar_t>, kVector> widened(
    const Vector<scalar_t, kVector>& z, const Vector<scalar_t, kVector>& t) {
  WidePair<wide_t<scalar_t>, kVector> pair;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    pair.z[k] = static_cast<wide_t<scalar_t>>(z.at[k]);
    pair.t[k] = static_cast<wide_t<scalar_t>>(t.at[k]);
  }
  return pair;
}

template <int kVector, typename scalar_t>
__device__ inline Vector<scalar_t, kVector> vector_at(const scalar_t* from) {
  return *reinterpret_cast<const Vector<scalar_t, kVector>*>(from);
}

// Calls visit(column, z, t) for the columns of this thread, in ascending order, with the vectors of
// both that begin there.
template <int kVector, typename scalar_t, typename Visit>
__device__ inline void walk_pair(const scalar_t* z, const scalar_t* t, int width,
                                 const Visit& visit) {
  int column = static_cast<int>(threadIdx.x) * kVector;
  if (column >= width) {
    return;
  }
  auto next_z = vector_at<kVector>(z + column);
  auto next_t = vector_at<kVector>(t + column);
  while (column < width) {
    const auto at_z = next_z;
    const auto at_t = next_t;
    const int next = column + kKlThreads * kVector;
    if (next < width) {
      next_z = vector_at<kVector>(z + next);
      next_t = vector_at<kVector>(t + next);
    }
    visit(column, widened<kVector>(at_z, at_t));
    column = next;
  }
}

// Adds a vector to sums; exponents are rescaled only where one of the two tops rises.
template <bool kHot, bool kReverse, int kVector, typename T>
__device__ inline void add_kl_vector(KlSums<T>& sums, int column, const WidePair<T, kVector>& pair,
                                     T inverse_temperature) {
  T top_z = sums.top_z;
  T top_t = sums.top_t;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    top_z = larger(top_z, pair.z[k]);
    top_t = larger(top_t, pair.t[k]);
  }
  if (top_z > sums.top_z || top_t > sums.top_t) {
    if (top_t > sums.top_t) {
#pragma unroll
      for (int k = kVector - 1; k >= 0; --k) {
        sums.first = pair.t[k] == top_t ? column + k : sums.first;
      }
    }
    raise_kl_tops<kHot, kReverse>(sums, top_z, top_t, inverse_temperature);
  }
  const T base_z = base_of(sums.top_z);
  const T base_t = base_of(sums.top_t);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    add_kl_terms(sums, kl_terms<kHot, kReverse>(pair.z[k], pair.t[k], base_z, base_t,
                                                inverse_temperature));
  }
}

//   out   [12, rows]; a block for each row, kReduceBytes<KlSums, kKlThreads> of shared memory.
template <typename scalar_t, int kVector, bool kHot, bool kReverse>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    kl_partials_kernel(const scalar_t* __restrict__ student, const scalar_t* __restrict__ teacher,
                       const std::int64_t* __restrict__ labels, wide_t<scalar_t>* __restrict__ out,
                       std::int64_t rows, int width, wide_t<scalar_t> inverse_temperature) {
  using math_t = wide_t<scalar_t>;
  MLR1_SHARED(shared);
  const std::int64_t row = blockIdx.x;
  const scalar_t* const z = student + row * width;
  const scalar_t* const t = teacher + row * width;
  auto sums = no_kl_sums<math_t>();
  walk_pair<kVector>(z, t, width, [&](int column, const WidePair<math_t, kVector>& pair) {
    add_kl_vector<kHot, kReverse>(sums, column, pair, inverse_temperature);
  });
  const MergeKlSums<kHot, kReverse, math_t> merge{inverse_temperature};
  sums = block_reduce<kKlThreads>(sums, merge, shared);
  if (threadIdx.x == 0) {
    write_kl_partials(
        sums, width, labels[row], kHot, kReverse, inverse_temperature,
        [&](std::int64_t v) { return static_cast<math_t>(z[v]); },
        [&](std::int64_t v) { return static_cast<math_t>(t[v]); }, out + row, rows);
  }
}

struct AddJsdTerms {
  template <typename T>
  MLR1_HOST_DEVICE JsdTerms<T> operator()(const JsdTerms<T>& a, const JsdTerms<T>& b) const {
    return {a.teacher + b.teacher, a.student + b.student};
  }
};

//   out   [2, rows]; a block for each row, kReduceBytes<JsdTerms, kKlThreads> of shared memory.
template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    jsd_partials_kernel(const scalar_t* __restrict__ student, const scalar_t* __restrict__ teacher,
                        const wide_t<scalar_t>* __restrict__ between,
                        const wide_t<scalar_t>* __restrict__ lse,
                        wide_t<scalar_t>* __restrict__ out, std::int64_t rows, int width,
                        KlObjective<wide_t<scalar_t>> objective) {
  using math_t = wide_t<scalar_t>;
  MLR1_SHARED(shared);
  const std::int64_t row = blockIdx.x;
  const math_t row_between = between[row];
  const math_t row_lse = lse[row];
  JsdTerms<math_t> sums{math_t(0), math_t(0)};
  walk_pair<kVector>(
      student + row * width, teacher + row * width, width,
      [&](int, const WidePair<math_t, kVector>& pair) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          sums = AddJsdTerms{}(
              sums, jsd_terms(pair.z[k], pair.t[k], row_between, row_lse, objective));
        }
      });
  sums = block_reduce<kKlThreads>(sums, AddJsdTerms{}, shared);
  if (threadIdx.x == 0) {
    out[row] = sums.teacher;
    out[row + rows] = sums.student;
  }
}

// Overwrites a row by what element(column, z) makes of it, in out_t: the row's own type, or a
// narrower one in the first part of its memory. All threads of a block of kKlThreads.
//
// A block walks over the row tile by tile, front to back. A narrower tile lies where tiles of at
// most half its number were: before they are overwritten, all threads must have read them, and a
// barrier behind the loads of tiles 0, 1, 2, 4, 8 ... sees to that.
template <typename out_t, int kVector, typename scalar_t, typename Load, typename Element>
__device__ inline void overwrite_row(scalar_t* row, int width, const Load& load,
                                     const Element& element) {
  constexpr int kUnrolled = sizeof(scalar_t) * kVector < kVectorBytes ? 4 : 2;
  constexpr int kTile = kKlThreads * kVector * kUnrolled;
  using Loaded = decltype(load(0));
  auto* const out = reinterpret_cast<out_t*>(row);
  int tile = 0;
  for (int begin = 0; begin < width; begin += kTile, ++tile) {
    Loaded loaded[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int column = begin + (u * kKlThreads + static_cast<int>(threadIdx.x)) * kVector;
      if (column < width) {
        loaded[u] = load(column);
      }
    }
    if (!std::is_same_v<scalar_t, out_t> && (tile & (tile - 1)) == 0) {
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int column = begin + (u * kKlThreads + static_cast<int>(threadIdx.x)) * kVector;
      if (column < width) {
        Vector<out_t, kVector> made;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          made.at[k] = static_cast<out_t>(element(column + k, k, loaded[u]));
        }
        *reinterpret_cast<Vector<out_t, kVector>*>(out + column) = made;
      }
    }
  }
}

struct AddKlSplits {
  template <typename T>
  MLR1_HOST_DEVICE KlSplit<T> operator()(const KlSplit<T>& a, const KlSplit<T>& b) const {
    return {a.head + b.head, a.tail + b.tail, a.mass + b.mass};
  }
};

template <typename scalar_t, int kVector>
struct VectorPair {
  Vector<scalar_t, kVector> z;
  Vector<scalar_t, kVector> t;
};

//   out   [3, rows]; a block for each row, kReduceBytes<KlSplit, kKlThreads> of shared memory.
template <typename scalar_t, typename out_t, int kVector, bool kHot, KlDirection kDirection>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    kl_gradient_kernel(scalar_t* student, const scalar_t* __restrict__ teacher,
                       const std::int64_t* __restrict__ labels,
                       const wide_t<scalar_t>* __restrict__ rows_4C,
                       const wide_t<scalar_t>* __restrict__ weights_3C,
                       wide_t<scalar_t>* __restrict__ out, std::int64_t rows, int width,
                       KlObjective<wide_t<scalar_t>> objective) {
  using math_t = wide_t<scalar_t>;
  using pair_t = VectorPair<scalar_t, kVector>;
  MLR1_SHARED(shared);
  const std::int64_t row = blockIdx.x;
  scalar_t* const z = student + row * width;
  const scalar_t* const t = teacher + row * width;
  const std::int64_t label = labels[row];
  const KlRow<math_t> numbers = kl_row(rows_4C, weights_3C, row, rows);
  KlSplit<math_t> split{math_t(0), math_t(0), math_t(0)};
  overwrite_row<out_t, kVector>(
      z, width,
      [&](int column) {
        return pair_t{vector_at<kVector>(static_cast<const scalar_t*>(z) + column),
                      vector_at<kVector>(t + column)};
      },
      [&](int column, int k, const pair_t& pair) {
        const auto made =
            kl_gradient<kHot, kDirection>(static_cast<math_t>(pair.z.at[k]),
                                          static_cast<math_t>(pair.t.at[k]), numbers, objective);
        split = AddKlSplits{}(split, kl_split(made.p, made.term));
        return column == label ? made.gradient - numbers.weight : made.gradient;
      });
  split = block_reduce<kKlThreads>(split, AddKlSplits{}, shared);
  if (threadIdx.x == 0) {
    out[row] = split.head;
    out[row + rows] = split.tail;
    out[row + 2 * rows] = split.mass;
  }
}

}  // namespace mlr1
