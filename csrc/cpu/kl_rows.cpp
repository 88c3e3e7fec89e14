// CPU rows of the ops of megatron_mlr1/ops/kl_rows.py. A pair of rows stays in a core's cache while
// mlr1::kl_ goes over it again.
#include "kl_rows.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "common/cpu.h"
#include "common/kl_tensors.h"
#include "common/logit_types.h"
#include "common/row_blocks.h"

namespace mlr1 {

// What becomes of one block. The sums over it are a loop of their own: one loop of both is too much
// for GCC to turn into vectors.
template <typename T>
struct GradientBlock {
  alignas(64) T gradient[kBlock];
  alignas(64) T p[kBlock];
  alignas(64) T term[kBlock];
};

namespace {

template <bool kHot, bool kReverse, typename T>
MLR1_INLINE void add_block(const T* z, const T* t, int64_t count, T inverse, KlSums<T>& sums) {
  Lanes<T> q, q_hot, p, p_hot, cross, spread;
  const T origin_z = origin_of_powers(sums.top_z);
  const T origin_t = origin_of_powers(sums.top_t);
  const auto add = [&](int64_t i, int k) MLR1_INLINES {
    const auto terms = kl_terms<kHot, kReverse>(z[i + k], t[i + k], origin_z, origin_t, inverse);
    q.at[k] += terms.q;
    p.at[k] += terms.p;
    if (kHot) {
      q_hot.at[k] += terms.q_hot;
      p_hot.at[k] += terms.p_hot;
    }
    cross.at[k] += terms.cross;
    spread.at[k] += terms.spread;
  };
  MLR1_FOR_LANES(count, add)
  add_kl_terms(sums, {q.sum(), q_hot.sum(), p.sum(), p_hot.sum(), cross.sum(), spread.sum()});
}

template <typename T>
MLR1_INLINE void add_jsd_block(const T* z, const T* t, int64_t count, T between, T lse,
                               const KlObjective<T>& objective, JsdTerms<T>& sums) {
  const KlObjective<T> own = in_own_base(objective);
  const T own_between = between * to_own_base<T>();
  const T own_lse = lse * to_own_base<T>();
  Lanes<T> teacher, student;
  const auto add = [&](int64_t i, int k) MLR1_INLINES {
    const auto terms = jsd_terms(z[i + k], t[i + k], own_between, own_lse, own);
    teacher.at[k] += terms.teacher;
    student.at[k] += terms.student;
  };
  MLR1_FOR_LANES(count, add)
  sums.teacher += teacher.sum();
  sums.student += student.sum();
}

template <bool kHot, KlDirection kDirection, typename T>
MLR1_INLINE void gradient_block(const T* __restrict z, const T* __restrict t,
                                GradientBlock<T>& __restrict made, int64_t count,
                                const KlRow<T>& row, const KlObjective<T>& objective) {
  const KlRow<T> own_row = in_own_base<kDirection>(row);
  const KlObjective<T> own_objective = in_own_base(objective);
  const auto write = [&](int64_t i, int k) MLR1_INLINES {
    const auto terms = kl_gradient<kHot, kDirection>(z[i + k], t[i + k], own_row, own_objective);
    made.gradient[i + k] = terms.gradient;
    made.p[i + k] = terms.p;
    made.term[i + k] = terms.term;
  };
  MLR1_FOR_LANES(count, write)
}

template <typename T>
MLR1_INLINE void split_block(const GradientBlock<T>& made, int64_t count, KlSplit<T>& sums) {
  Lanes<T> head, tail, mass;
  const auto add = [&](int64_t i, int k) MLR1_INLINES {
    KlSplit<T> split{head.at[k], tail.at[k], mass.at[k]};
    add_to_kl_split(split, made.p[i + k], made.term[i + k]);
    head.at[k] = split.head;
    tail.at[k] = split.tail;
    mass.at[k] = split.mass;
  };
  MLR1_FOR_LANES(count, add)
  sums.head += head.sum();
  sums.tail += tail.sum();
  sums.mass += mass.sum();
}

}  // namespace

// Functions of one type each and not templates: GCC clones no template. And of one way each: in one
// function of all ways it stops to make vectors.
#define MLR1_KL_SUMS(T, name, kHot, kReverse)                                                      \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void name(const T* z, const T* t, int64_t count, T inverse,      \
                                            KlSums<T>& sums) {                                     \
    add_block<kHot, kReverse>(z, t, count, inverse, sums);                                         \
  }
#define MLR1_KL_GRADIENT(T, name, kHot, kDirection)                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void name(const T* z, const T* t, int64_t count,                 \
                                            const KlRow<T>& row, const KlObjective<T>& objective,  \
                                            GradientBlock<T>& made) {                              \
    gradient_block<kHot, KlDirection::kDirection>(z, t, made, count, row, objective);              \
  }
#define MLR1_KL_BLOCKS(T)                                                                          \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void kl_top_block(const T* z, int64_t count, T& top) {           \
    top = top_of_block(z, count);                                                                  \
  }                                                                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void jsd_block(const T* z, const T* t, int64_t count, T between, \
                                                 T lse, const KlObjective<T>& objective,           \
                                                 JsdTerms<T>& sums) {                              \
    add_jsd_block(z, t, count, between, lse, objective, sums);                                     \
  }                                                                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void kl_split_block(const GradientBlock<T>& made, int64_t count, \
                                                      KlSplit<T>& sums) {                          \
    split_block(made, count, sums);                                                                \
  }                                                                                                \
  MLR1_KL_SUMS(T, forward_sums, false, false)                                                      \
  MLR1_KL_SUMS(T, reverse_sums, false, true)                                                       \
  MLR1_KL_SUMS(T, hot_forward_sums, true, false)                                                   \
  MLR1_KL_SUMS(T, hot_reverse_sums, true, true)                                                    \
  MLR1_KL_GRADIENT(T, forward_gradient, false, forward)                                            \
  MLR1_KL_GRADIENT(T, reverse_gradient, false, reverse)                                            \
  MLR1_KL_GRADIENT(T, jsd_gradient, false, jsd)                                                    \
  MLR1_KL_GRADIENT(T, hot_forward_gradient, true, forward)                                         \
  MLR1_KL_GRADIENT(T, hot_reverse_gradient, true, reverse)                                         \
  MLR1_KL_GRADIENT(T, hot_jsd_gradient, true, jsd)

MLR1_KL_BLOCKS(float)
MLR1_KL_BLOCKS(double)

namespace {

template <typename T>
void kl_block(const T* z, const T* t, int64_t count, bool hot, bool reverse, T inverse,
              KlSums<T>& sums) {
  if (hot) {
    reverse ? hot_reverse_sums(z, t, count, inverse, sums)
            : hot_forward_sums(z, t, count, inverse, sums);
  } else {
    reverse ? reverse_sums(z, t, count, inverse, sums) : forward_sums(z, t, count, inverse, sums);
  }
}

template <typename T>
void kl_gradient_block(const T* z, const T* t, int64_t count, bool hot, KlDirection direction,
                       const KlRow<T>& row, const KlObjective<T>& objective,
                       GradientBlock<T>& made) {
  if (direction == KlDirection::forward) {
    hot ? hot_forward_gradient(z, t, count, row, objective, made)
        : forward_gradient(z, t, count, row, objective, made);
  } else if (direction == KlDirection::reverse) {
    hot ? hot_reverse_gradient(z, t, count, row, objective, made)
        : reverse_gradient(z, t, count, row, objective, made);
  } else {
    hot ? hot_jsd_gradient(z, t, count, row, objective, made)
        : jsd_gradient(z, t, count, row, objective, made);
  }
}

template <typename T>
KlSums<T> merged(const KlSums<T>& a, const KlSums<T>& b, bool hot, bool reverse, T inverse) {
  if (hot) {
    return reverse ? merged_kl_sums<true, true>(a, b, inverse)
                   : merged_kl_sums<true, false>(a, b, inverse);
  }
  return reverse ? merged_kl_sums<false, true>(a, b, inverse)
                 : merged_kl_sums<false, false>(a, b, inverse);
}

// As others take them.
template <typename T, typename scalar_t>
KlSums<T> sums_of_row(const scalar_t* z, const scalar_t* t, int64_t width, bool hot, bool reverse,
                      T inverse) {
  KlSums<T> total = no_kl_sums<T>();
  Block<T> room_z, room_t;
  for_each_block(width, [&](int64_t begin, int64_t count) {
    const T* const wide_z = widen(z + begin, count, room_z);
    const T* const wide_t = widen(t + begin, count, room_t);
    KlSums<T> sums = no_kl_sums<T>();
    kl_top_block(wide_z, count, sums.top_z);
    kl_top_block(wide_t, count, sums.top_t);
    if (sums.top_t > total.top_t) {
      const auto* const first = std::find(wide_t, wide_t + count, sums.top_t);
      sums.first = static_cast<int>(begin + (first - wide_t));
    }
    sums.top_z = larger(sums.top_z, total.top_z);
    sums.top_t = larger(sums.top_t, total.top_t);
    kl_block(wide_z, wide_t, count, hot, reverse, inverse, sums);
    total = merged(total, sums, hot, reverse, inverse);
  });
  return told_kl_sums(total, static_cast<int>(width), hot, reverse, inverse);
}

template <typename T, typename scalar_t>
JsdTerms<T> jsd_of_row(const scalar_t* z, const scalar_t* t, int64_t width, T between, T lse,
                       const KlObjective<T>& objective) {
  JsdTerms<T> sums{0, 0};
  Block<T> room_z, room_t;
  for_each_block(width, [&](int64_t begin, int64_t count) {
    jsd_block(widen(z + begin, count, room_z), widen(t + begin, count, room_t), count, between,
              lse, objective, sums);
  });
  return told_jsd_terms(sums);
}

at::Tensor kl_partials_cpu(const at::Tensor& student, const at::Tensor& teacher,
                           const at::Tensor& label_C, double temperature, bool reverse) {
  check_pair(student, teacher);
  const at::Tensor label = label_C.contiguous();
  const int64_t rows = student.size(0);
  const int64_t width = student.size(1);
  at::Tensor out = empty_statistics(student, kKlPartials);
  with_logits(student, [&](auto zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    const scalar_t* const z = student.const_data_ptr<scalar_t>();
    const scalar_t* const t = teacher.const_data_ptr<scalar_t>();
    const int64_t* const labels = label.const_data_ptr<int64_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    const math_t inverse = static_cast<math_t>(1 / temperature);
    const bool hot = temperature != 1;
    share_rows(student, [&](int64_t row) {
      const scalar_t* const row_z = z + row * width;
      const scalar_t* const row_t = t + row * width;
      write_kl_partials(sums_of_row(row_z, row_t, width, hot, reverse, inverse),
                        static_cast<int>(width), labels[row], reverse, row_z, row_t, to + row,
                        rows);
    });
  });
  return out;
}

at::Tensor jsd_partials_cpu(const at::Tensor& student, const at::Tensor& teacher,
                            const at::Tensor& between_C, const at::Tensor& lse_C,
                            double temperature, double beta) {
  check_pair(student, teacher);
  const at::Tensor between = as_statistics(between_C, student);
  const at::Tensor lse = as_statistics(lse_C, student);
  const int64_t rows = student.size(0);
  const int64_t width = student.size(1);
  at::Tensor out = empty_statistics(student, 2);
  with_logits(student, [&](auto zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    const scalar_t* const z = student.const_data_ptr<scalar_t>();
    const scalar_t* const t = teacher.const_data_ptr<scalar_t>();
    const math_t* const row_between = between.const_data_ptr<math_t>();
    const math_t* const row_lse = lse.const_data_ptr<math_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    const auto objective = kl_objective<math_t>(temperature, beta);
    share_rows(student, [&](int64_t row) {
      const auto sums = jsd_of_row(z + row * width, t + row * width, width, row_between[row],
                                   row_lse[row], objective);
      to[row] = sums.teacher;
      to[row + rows] = sums.student;
    });
  });
  return out;
}

// Overwrites one row by its gradient, front to back: a block is written when it has been read, and
// a narrower one lies within what has been read.
template <typename out_t, typename T, typename scalar_t>
KlSplit<T> gradient_of_row(scalar_t* z, const scalar_t* t, int64_t width, int64_t label, bool hot,
                           KlDirection direction, const KlRow<T>& row,
                           const KlObjective<T>& objective) {
  KlSplit<T> sums{0, 0, 0};
  Block<T> room_z, room_t;
  GradientBlock<T> made;
  for_each_block(width, [&](int64_t begin, int64_t count) {
    kl_gradient_block(widen(z + begin, count, room_z), widen(t + begin, count, room_t), count, hot,
                      direction, row, objective, made);
    kl_split_block(made, count, sums);
    if (label >= begin && label < begin + count) {
      made.gradient[label - begin] -= row.weight;
    }
    out_t* const out = reinterpret_cast<out_t*>(z) + begin;
    if (row.is_idle()) {
      std::fill_n(out, count, out_t(0));
    } else {
      narrow(made.gradient, count, out);
    }
  });
  return sums;
}

at::Tensor kl_gradient_cpu(const at::Tensor& student, const at::Tensor& teacher,
                           const at::Tensor& label_C, const at::Tensor& rows_4C,
                           const at::Tensor& weights_3C, double temperature,
                           c10::string_view direction, double beta, at::ScalarType dtype) {
  check_pair(student, teacher);
  const at::Tensor label = label_C.contiguous();
  const at::Tensor row_numbers = as_statistics(rows_4C, student);
  const at::Tensor weights = as_statistics(weights_3C, student);
  const int64_t rows = student.size(0);
  const int64_t width = student.size(1);
  const KlDirection way = direction_of(direction);
  at::Tensor out = empty_statistics(student, 3);
  with_logits_and_gradient(student, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using out_t = decltype(narrow_zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = student.mutable_data_ptr<scalar_t>();
    const scalar_t* const t = teacher.const_data_ptr<scalar_t>();
    const int64_t* const labels = label.const_data_ptr<int64_t>();
    const math_t* const numbers = row_numbers.const_data_ptr<math_t>();
    const math_t* const row_weights = weights.const_data_ptr<math_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    const auto objective = kl_objective<math_t>(temperature, beta);
    share_rows(student, [&](int64_t row) {
      const auto sums = gradient_of_row<out_t>(
          z + row * width, t + row * width, width, labels[row], temperature != 1, way,
          kl_row(numbers, row_weights, row, rows), objective);
      write_kl_split(sums, to + row, rows);
    });
  });
  return out;
}

// All of a pair of rows: its statistics, and the gradient in place of the student's.
template <typename out_t, typename T, typename scalar_t>
void loss_of_row(scalar_t* z, const scalar_t* t, int64_t width, int64_t label, T cross_entropy,
                 T divergence, KlDirection direction, const KlObjective<T>& objective,
                 const KlLoss<T>& loss, T* out, int64_t stride) {
  const bool hot = loss.temperature != 1;
  const bool reverse = direction == KlDirection::reverse;
  const T inverse = objective.inverse_temperature;
  const auto sums = sums_of_row(z, t, width, hot, reverse, inverse);
  auto known = kl_known(sums, reverse, inverse);
  T centre = known.divergence;
  if (direction == KlDirection::jsd) {
    const auto halves = jsd_of_row(z, t, width, known.between, known.hot_lse, objective);
    known.divergence = jsd_of(halves, objective);
    centre = halves.student;
  }
  const int columns = static_cast<int>(width);
  write_kl_known(known, logit_at_label<T>(z, label, columns), logit_at_label<T>(t, label, columns),
                 out, stride);
  out[5 * stride] = width > 0 ? kl_agreement(sums, static_cast<T>(z[sums.first])) : T(0);
  const auto row = kl_row(known, centre, cross_entropy, divergence, loss);
  write_kl_split(gradient_of_row<out_t>(z, t, width, label, hot, direction, row, objective),
                 out + 6 * stride, stride);
}

at::Tensor kl_cpu(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& label_C,
                  const at::Tensor& weights_2C, double temperature, c10::string_view direction,
                  double beta, double z_loss, at::ScalarType dtype) {
  check_pair(student, teacher);
  const at::Tensor label = label_C.contiguous();
  const at::Tensor weights = as_statistics(weights_2C, student);
  const int64_t rows = student.size(0);
  const int64_t width = student.size(1);
  const KlDirection way = direction_of(direction);
  at::Tensor out = empty_statistics(student, kKlStatistics);
  with_logits_and_gradient(student, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = student.mutable_data_ptr<scalar_t>();
    const scalar_t* const t = teacher.const_data_ptr<scalar_t>();
    const int64_t* const labels = label.const_data_ptr<int64_t>();
    const math_t* const weight = weights.const_data_ptr<math_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    const auto objective = kl_objective<math_t>(temperature, beta);
    const KlLoss<math_t> loss{static_cast<math_t>(temperature), static_cast<math_t>(z_loss)};
    share_rows(student, [&](int64_t row) {
      loss_of_row<decltype(narrow_zero)>(z + row * width, t + row * width, width, labels[row],
                                         weight[row], weight[row + rows], way, objective, loss,
                                         to + row, rows);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) {
  m.impl("kl_partials", kl_partials_cpu);
  m.impl("jsd_partials", jsd_partials_cpu);
  m.impl("kl_gradient_", kl_gradient_cpu);
  m.impl("kl_", kl_cpu);
}

}  // namespace mlr1
