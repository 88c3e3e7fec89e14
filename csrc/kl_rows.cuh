// Kernels of the ops of megatron_mlr1/ops/kl_rows.py, bound by memory. Of each pair of logits, z of
// the student and t of the teacher:
//   kl_           reads both once and writes one, where the shared memory of a cluster's blocks has
//                 room for the pair of rows. Where it has room for z and a part of t, the rest of t
//                 is read again, from a second-level cache that has just seen it; where it has none
//                 for z, both are read again, and for the jsd once more;
//   kl_partials   reads both once, and so does jsd_partials;
//   kl_gradient_  reads both once and writes one.
// In bytes a pair, of fp32 logits with a gradient of bf16: 8 + 2 by kl_; by the others, which serve
// a split vocabulary, 16 + 2, and for the jsd 24 + 2. In kl_ a cluster takes a row, else a block;
// threads take neighbouring vectors of 16 bytes, and have several of each row under way.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/kl_batches.h"
#include "common/reduce.h"
#include "common/row_walks.h"
#include "kl_rows.h"

namespace mlr1 {

constexpr int kKlThreads = 512;
// Blocks that a multiprocessor holds at least, so that a thread has 64 registers; in fp64, 128.
template <typename scalar_t>
constexpr int kKlBlocks = sizeof(scalar_t) == sizeof(double) ? 1 : 2;

// Of kl_, whose clusters share a row: what a thread does once a row, reductions above all, weighs the
// less the more of it each one takes.
constexpr int kKlThreadsOfOnce = 256;
// So that a thread has 80 registers; in fp64, 128.
template <typename scalar_t, unsigned kThreads>
constexpr int kKlBlocksOfOnce = (sizeof(scalar_t) == sizeof(double) ? 512 : 768) / kThreads;

// Pairs of vectors that a thread has under way.
template <typename scalar_t>
constexpr int kKlBatch = sizeof(scalar_t) <= 4 ? 2 : 1;
// Of kl_ while it reads: as many as leave its registers room, of which fp16 takes the most.
template <typename scalar_t>
constexpr int kKlBatchOfOnce =
    std::is_same_v<scalar_t, c10::Half> ? kKlBatch<scalar_t> : 2 * kKlBatch<scalar_t>;

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
  walk_pair<kVector, kKlThreads, kKlBatch<scalar_t>>(
      0, width, loads_of<kVector>(z, t), [&](int column, int stride, const auto& pairs) {
        add_kl_batch<kHot, kReverse>(sums, column, stride, width, pairs, inverse_temperature);
      });
  if (sums.first < width) {
    sums.first = first_column(sums.first, packed_at<kVector>(t + sums.first), sums.top_t);
  }
  const MergeKlSums<kHot, kReverse, math_t> merge{inverse_temperature};
  sums = block_reduce<kKlThreads, true>(sums, merge, shared);
  if (threadIdx.x == 0) {
    write_kl_partials(told_kl_sums(sums, width, kHot, kReverse, inverse_temperature), width,
                      labels[row], kReverse, z, t, out + row, rows);
  }
}

struct AddJsdTerms {
  template <typename T>
  MLR1_HOST_DEVICE JsdTerms<T> operator()(const JsdTerms<T>& a, const JsdTerms<T>& b) const {
    return {a.teacher + b.teacher, a.student + b.student};
  }
};

// What a thread adds to the halves of the JSD of a row, in the own base; load as for walk_pair().
//   between, lse   as for jsd_terms(), but natural.
template <typename scalar_t, int kVector, unsigned kThreads, int kMany, typename Load>
__device__ inline JsdTerms<wide_t<scalar_t>> jsd_of_columns(
    int begin, int end, const Load& load, wide_t<scalar_t> between, wide_t<scalar_t> lse,
    const KlObjective<wide_t<scalar_t>>& objective) {
  using math_t = wide_t<scalar_t>;
  const auto own = in_own_base(objective);
  const math_t own_between = between * to_own_base<math_t>();
  const math_t own_lse = lse * to_own_base<math_t>();
  JsdTerms<math_t> sums{math_t(0), math_t(0)};
  walk_pair<kVector, kThreads, kMany>(
      begin, end, load, [&](int column, int stride, const auto& pairs) {
#pragma unroll
        for (int u = 0; u < kMany; ++u) {
          if (u == 0 || column + u * stride < end) {
            const auto [z, t] = widened(pairs[u]);
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
              sums = AddJsdTerms{}(sums, jsd_terms(z.at[k], t.at[k], own_between, own_lse, own));
            }
          }
        }
      });
  return sums;
}

//   out   [2, rows]; a block for each row, kReduceBytes<JsdTerms, kKlThreads> of shared memory.
template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    jsd_partials_kernel(const scalar_t* __restrict__ student, const scalar_t* __restrict__ teacher,
                        const wide_t<scalar_t>* __restrict__ between,
                        const wide_t<scalar_t>* __restrict__ lse,
                        wide_t<scalar_t>* __restrict__ out, std::int64_t rows, int width,
                        KlObjective<wide_t<scalar_t>> objective) {
  MLR1_SHARED(shared);
  const std::int64_t row = blockIdx.x;
  auto sums = jsd_of_columns<scalar_t, kVector, kKlThreads, kKlBatch<scalar_t>>(
      0, width, loads_of<kVector>(student + row * width, teacher + row * width), between[row],
      lse[row], objective);
  sums = block_reduce<kKlThreads, true>(sums, AddJsdTerms{}, shared);
  if (threadIdx.x == 0) {
    const auto halves = told_jsd_terms(sums);
    out[row] = halves.teacher;
    out[row + rows] = halves.student;
  }
}

// Overwrites a row that `load` reads, by a block of kKlThreads; see overwrite_columns().
template <typename out_t, int kVector, typename scalar_t, typename Load, typename Element>
__device__ inline void overwrite_row(scalar_t* row, int width, const Load& load,
                                     const Element& element) {
  constexpr int kUnrolled = kLoadedAtOnce<scalar_t, kVector>;
  overwrite_columns<out_t, kVector, kKlThreads, kUnrolled>(row, 0, width, true, load, element);
}

struct AddKlSplits {
  template <typename T>
  MLR1_HOST_DEVICE KlSplit<T> operator()(const KlSplit<T>& a, const KlSplit<T>& b) const {
    return {a.head + b.head, a.tail + b.tail, a.mass + b.mass};
  }
};

// Overwrites columns of a row by their gradient; gives what this thread adds to the split. Other
// arguments are as for overwrite_columns(); z_now and t have the logits at the label. The gradient
// there is written once more, by the thread that wrote it, so that no column is compared with it.
template <typename out_t, int kVector, unsigned kThreads, int kUnrolled, bool kHot,
          KlDirection kDirection, typename scalar_t, typename Load>
__device__ inline KlSplit<wide_t<scalar_t>> overwrite_by_gradient(
    scalar_t* z, int begin, int end, bool reads, const Load& load, const scalar_t* z_now,
    const scalar_t* t, int label, const KlRow<wide_t<scalar_t>>& row,
    const KlObjective<wide_t<scalar_t>>& objective) {
  using math_t = wide_t<scalar_t>;
  const bool is_idle = row.is_idle();
  const auto own_row = in_own_base<kDirection>(row);
  const auto own_objective = in_own_base(objective);
  const bool has_label = label >= begin && label < end &&
                         static_cast<unsigned>((label - begin) / kVector) % kThreads == threadIdx.x;
  math_t at_label = 0;
  if (has_label && !is_idle) {
    at_label = kl_gradient<kHot, kDirection>(static_cast<math_t>(z_now[label]),
                                             static_cast<math_t>(t[label]), own_row,
                                             own_objective)
                   .gradient -
               row.weight;
  }
  KlSplit<math_t> split{math_t(0), math_t(0), math_t(0)};
  overwrite_columns<out_t, kVector, kThreads, kUnrolled>(
      z, begin, end, reads, load,
      [&](int, int k, const WidePair<math_t, kVector>& pair) {
        const auto made =
            kl_gradient<kHot, kDirection>(pair.z.at[k], pair.t.at[k], own_row, own_objective);
        add_to_kl_split(split, made.p, made.term);
        return is_idle ? math_t(0) : made.gradient;
      });
  if (has_label) {
    reinterpret_cast<out_t*>(z)[label] = static_cast<out_t>(at_label);
  }
  return split;
}

//   out   [3, rows]; a block for each row, kReduceBytes<KlSplit, kKlThreads> of shared memory.
template <typename scalar_t, typename out_t, int kVector, bool kHot, KlDirection kDirection>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<scalar_t>)
    kl_gradient_kernel(scalar_t* student, const scalar_t* __restrict__ teacher,
                       const std::int64_t* __restrict__ labels,
                       const wide_t<scalar_t>* __restrict__ rows_4C,
                       const wide_t<scalar_t>* __restrict__ weights_3C,
                       wide_t<scalar_t>* __restrict__ out, std::int64_t rows, int width,
                       KlObjective<wide_t<scalar_t>> objective) {
  MLR1_SHARED(shared);
  const std::int64_t row = blockIdx.x;
  scalar_t* const z = student + row * width;
  const scalar_t* const t = teacher + row * width;
  constexpr int kUnrolled = kLoadedAtOnce<scalar_t, kVector>;
  auto split = overwrite_by_gradient<out_t, kVector, kKlThreads, kUnrolled, kHot, kDirection>(
      z, 0, width, true, loads_of<kVector>(z, t), z, t, static_cast<int>(labels[row]),
      kl_row(rows_4C, weights_3C, row, rows), objective);
  split = block_reduce<kKlThreads, true>(split, AddKlSplits{}, shared);
  if (threadIdx.x == 0) {
    write_kl_split(split, out + row, rows);
  }
}

// Pairs of rows over a whole vocabulary.
template <typename scalar_t>
struct KlPairs {
  scalar_t* student;                   // [rows, width], overwritten
  const scalar_t* teacher;             // [rows, width]
  const std::int64_t* labels;          // [rows]
  const wide_t<scalar_t>* weights_2C;  // [2, rows]: of the cross-entropy, of the divergence
  wide_t<scalar_t>* out;               // [9, rows]
  std::int64_t rows;
  int width;
};

// What the blocks of a cluster take of a row; counts of columns are multiples of the vector.
struct KlShares {
  int columns;   // of each block
  bool keeps_z;  // whether shared memory holds their z; else the cluster is one block
  int kept_t;    // of how many, the first ones, it holds t
};

// Shared memory at the begin of a block's: what reductions need, and what they tell all threads.
template <typename math_t, unsigned kThreads>
struct KlRoom {
  static constexpr std::size_t kSums = (kReduceBytes<KlSums<math_t>, kThreads> + 15) / 16 * 16;
  static constexpr std::size_t kJsd = kSums + kClusterReduceBytes<KlSums<math_t>>;
  static constexpr std::size_t kSplit = kJsd + kClusterReduceBytes<JsdTerms<math_t>>;
  static constexpr std::size_t kKnown = kSplit + kClusterReduceBytes<KlSplit<math_t>>;
  static constexpr std::size_t kHalves = kKnown + (sizeof(KlKnown<math_t>) + 15) / 16 * 16;
  static constexpr std::size_t kBytes = kHalves + (sizeof(JsdTerms<math_t>) + 15) / 16 * 16;
};

// Over all threads of a cluster whose blocks have begun, for the first warp of each block: a warp that
// waits leaves its turns to other blocks. Each reduction has a `place` of its own behind `shared`:
// another block may still read the last one's.
template <unsigned kThreads, typename T, typename Merge>
__device__ inline T row_reduce(T value, const Merge& merge, unsigned char* shared,
                               std::size_t place) {
  value = block_reduce<kThreads, true>(value, merge, shared);
  return cluster_reduce<true>(value, merge, shared + place);
}

//   A cluster for each row, with KlRoom::kBytes of shared memory and room for what is kept.
template <typename scalar_t, typename out_t, int kVector, unsigned kThreads, bool kHot,
          KlDirection kDirection>
__global__ void __launch_bounds__(kThreads, (kKlBlocksOfOnce<scalar_t, kThreads>))
    kl_kernel(const KlPairs<scalar_t> of, const KlShares shares,
              const KlObjective<wide_t<scalar_t>> objective, const KlLoss<wide_t<scalar_t>> loss) {
  using math_t = wide_t<scalar_t>;
  using room = KlRoom<math_t, kThreads>;
  constexpr bool kReverse = kDirection == KlDirection::reverse;
  MLR1_SHARED(shared);
  cluster_arrive_unwritten();
  const std::int64_t row = blockIdx.x / cluster_size();
  scalar_t* const z = of.student + row * of.width;
  const scalar_t* const t = of.teacher + row * of.width;
  const int begin = static_cast<int>(cluster_rank()) * shares.columns;
  const int end = begin + shares.columns < of.width ? begin + shares.columns : of.width;
  const int kept_end = begin + shares.kept_t < end ? begin + shares.kept_t : end;
  // Each thread takes out of shared memory what it put there: no barrier lies between.
  scalar_t* const kept_z = reinterpret_cast<scalar_t*>(shared + room::kBytes) - begin;
  scalar_t* const kept_t = kept_z + (shares.keeps_z ? shares.columns : 0);
  const scalar_t* const z_again = shares.keeps_z ? kept_z : z;
  const auto label = static_cast<int>(of.labels[row]);
  const bool speaks = cluster_rank() == 0 && threadIdx.x == 0;
  const math_t label_z = speaks ? logit_at_label<math_t>(z, label, of.width) : math_t(0);
  const math_t label_t = speaks ? logit_at_label<math_t>(t, label, of.width) : math_t(0);

  const auto again = [&](int column) {
    return loads_of<kVector>(z_again, column < kept_end ? kept_t : t)(column);
  };
  auto sums = no_kl_sums<math_t>();
  walk_pair<kVector, kThreads, kKlBatchOfOnce<scalar_t>>(
      begin, end,
      [&](int column) {
        return VectorPair<scalar_t, kVector>{
            shares.keeps_z ? packed_seen_once<kVector>(z + column) : packed_at<kVector>(z + column),
            column < kept_end ? packed_seen_once<kVector>(t + column)
                              : packed_at<kVector>(t + column)};
      },
      [&](int first, int stride, const auto& pairs) {
#pragma unroll
        for (int u = 0; u < kKlBatchOfOnce<scalar_t>; ++u) {
          const int column = first + u * stride;
          if (shares.keeps_z && column < end) {
            *reinterpret_cast<Packed<Vector<scalar_t, kVector>>*>(kept_z + column) = pairs[u].z;
          }
          if (column < kept_end) {
            *reinterpret_cast<Packed<Vector<scalar_t, kVector>>*>(kept_t + column) = pairs[u].t;
          }
        }
        add_kl_batch<kHot, kReverse>(sums, first, stride, end, pairs,
                                     objective.inverse_temperature);
      });
  if (sums.first < end) {
    sums.first = first_column(sums.first, again(sums.first).t, sums.top_t);
  }
  cluster_wait();
  const MergeKlSums<kHot, kReverse, math_t> merge{objective.inverse_temperature};
  sums = row_reduce<kThreads>(sums, merge, shared, room::kSums);
  // From here on every thread of the cluster has read its logits.
  auto* const told_known = reinterpret_cast<KlKnown<math_t>*>(shared + room::kKnown);
  if (threadIdx.x == 0) {
    const auto told = told_kl_sums(sums, of.width, kHot, kReverse, objective.inverse_temperature);
    *told_known = kl_known(told, kReverse, objective.inverse_temperature);
    if (told.first >= begin && told.first < end) {
      of.out[5 * of.rows + row] = kl_agreement(told, static_cast<math_t>(z_again[told.first]));
    }
  }
  __syncthreads();
  auto known = *told_known;
  math_t centre = known.divergence;
  if constexpr (kDirection == KlDirection::jsd) {
    const auto terms = jsd_of_columns<scalar_t, kVector, kThreads, kKlBatch<scalar_t>>(
        begin, end, again, known.between, known.hot_lse, objective);
    const auto of_row = row_reduce<kThreads>(terms, AddJsdTerms{}, shared, room::kJsd);
    auto* const told_halves = reinterpret_cast<JsdTerms<math_t>*>(shared + room::kHalves);
    if (threadIdx.x == 0) {
      *told_halves = told_jsd_terms(of_row);
    }
    __syncthreads();
    known.divergence = jsd_of(*told_halves, objective);
    centre = told_halves->student;
  }
  auto* const out = of.out + row;
  if (speaks) {
    write_kl_known(known, label_z, label_t, out, of.rows);
  }
  const auto given = kl_row(known, centre, of.weights_2C[row], of.weights_2C[of.rows + row], loss);
  constexpr int kUnrolled = kVector > 4 ? 1 : kLoadedAtOnce<scalar_t, kVector>;
  auto split = overwrite_by_gradient<out_t, kVector, kThreads, kUnrolled, kHot, kDirection>(
      z, begin, end, !shares.keeps_z, again, z_again, t, label, given, objective);
  split = row_reduce<kThreads>(split, AddKlSplits{}, shared, room::kSplit);
  if (speaks) {
    write_kl_split(split, out + 6 * of.rows, of.rows);
  }
}

}  // namespace mlr1
