// Row arithmetic of mlr1::kl_partials, jsd_partials and kl_gradient_
// (megatron_mlr1/ops/kl_rows.py): what one pair of logits adds, how sums over parts of a row become
// one, what they are written as.
// Formulas and names stand in megatron_mlr1/ops/linear_kl.py: z of the student, t of the teacher.
// T is the type of the arithmetic: float for fp32, bf16 and fp16 logits, double for fp64.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/math.h"

namespace mlr1 {

constexpr int kKlPartials = 12;

// HEAD_PROBABILITY of the definition.
constexpr double kHeadProbability = 1.0 / 1024;

enum class KlDirection { forward, reverse, jsd };

// log(1 + y) for y of [0, 1]. On the host as 2 artanh(s) = 2 (s + s^3 / 3 + ...) with
// s = y / (2 + y) <= 1/3, up to terms below half a unit of the type.
template <typename T>
MLR1_HOST_DEVICE inline T log_one_and(T y) {
#if defined(__CUDA_ARCH__)
  return log1p(y);
#else
  constexpr int kTerms = sizeof(T) == sizeof(double) ? 17 : 8;
  const T s = y / (T(2) + y);
  T p = T(1) / T(2 * kTerms + 1);
  for (int k = kTerms - 1; k >= 0; --k) {
    p = p * (s * s) + T(1) / T(2 * k + 1);
  }
  return T(2) * s * p;
#endif
}

// What exponents are taken relative to: the largest logit, or a finite number where there is none.
template <typename T>
MLR1_HOST_DEVICE inline T base_of(T top) {
  constexpr T kLowest = std::numeric_limits<T>::lowest();
  return larger(top, kLowest);
}

// Sums over some columns of a row.
template <typename T>
struct KlSums {
  T top_z;    // largest z, -inf where there are no columns
  T top_t;    // largest t
  T q;        // of e^(z - top_z)
  T q_hot;    // of e^((z - top_z) / T); unused at temperature 1
  T p;        // of e^(t - top_t)
  T p_hot;    // of e^((t - top_t) / T); unused at temperature 1
  T cross;    // of e^((t - top_t) / T) (t - z), or of e^((z - top_z) / T) (z - t) if reverse
  T spread;   // of e^(t - top_t) (t - top_t)
  int first;  // column of the first t that equals top_t
};

template <typename T>
MLR1_HOST_DEVICE inline KlSums<T> no_kl_sums() {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  return {kNone, kNone, T(0), T(0), T(0), T(0), T(0), T(0), INT_MAX};
}

// What one pair of logits adds.
template <typename T>
struct KlTerms {
  T q, q_hot, p, p_hot, cross, spread;
};

template <bool kHot, bool kReverse, typename T>
MLR1_HOST_DEVICE inline KlTerms<T> kl_terms(T z, T t, T base_z, T base_t, T inverse_temperature) {
  const T student = z - base_z;
  const T teacher = t - base_t;
  KlTerms<T> terms;
  terms.q = exponential_of_any(student);
  terms.p = exponential_of_any(teacher);
  terms.q_hot = kHot ? exponential_of_any(student * inverse_temperature) : terms.q;
  terms.p_hot = kHot ? exponential_of_any(teacher * inverse_temperature) : terms.p;
  terms.cross = kReverse ? terms.q_hot * (z - t) : terms.p_hot * (t - z);
  terms.spread = terms.p * teacher;
  return terms;
}

template <typename T>
MLR1_HOST_DEVICE inline void add_kl_terms(KlSums<T>& sums, const KlTerms<T>& terms) {
  sums.q += terms.q;
  sums.q_hot += terms.q_hot;
  sums.p += terms.p;
  sums.p_hot += terms.p_hot;
  sums.cross += terms.cross;
  sums.spread += terms.spread;
}

// Makes sums relative to larger tops.
template <bool kHot, bool kReverse, typename T>
MLR1_HOST_DEVICE inline void raise_kl_tops(KlSums<T>& sums, T top_z, T top_t,
                                           T inverse_temperature) {
  const T shift_z = base_of(sums.top_z) - base_of(top_z);
  const T shift_t = base_of(sums.top_t) - base_of(top_t);
  const T factor_z = exponential_of_any(shift_z);
  const T factor_t = exponential_of_any(shift_t);
  const T hot_z = kHot ? exponential_of_any(shift_z * inverse_temperature) : factor_z;
  const T hot_t = kHot ? exponential_of_any(shift_t * inverse_temperature) : factor_t;
  sums.q *= factor_z;
  sums.q_hot *= hot_z;
  // The factor is zero long before the bound: without it the product could be infinite, and NaN.
  sums.spread = (sums.spread + larger(shift_t, T(-1e4)) * sums.p) * factor_t;
  sums.p *= factor_t;
  sums.p_hot *= hot_t;
  sums.cross *= kReverse ? hot_z : hot_t;
  sums.top_z = top_z;
  sums.top_t = top_t;
}

// Sums over the columns of both. The same two in the same order give the same bits.
template <bool kHot, bool kReverse, typename T>
MLR1_HOST_DEVICE inline KlSums<T> merged_kl_sums(KlSums<T> a, KlSums<T> b, T inverse_temperature) {
  const T top_z = larger(a.top_z, b.top_z);
  const T top_t = larger(a.top_t, b.top_t);
  const bool takes_b = b.top_t > a.top_t || (b.top_t == a.top_t && b.first < a.first);
  raise_kl_tops<kHot, kReverse>(a, top_z, top_t, inverse_temperature);
  raise_kl_tops<kHot, kReverse>(b, top_z, top_t, inverse_temperature);
  a.first = takes_b ? b.first : a.first;
  add_kl_terms(a, KlTerms<T>{b.q, b.q_hot, b.p, b.p_hot, b.cross, b.spread});
  return a;
}

// Writes one row's partials to out[0], out[stride], ... out[11 * stride].
//   z, t   read a logit at a column.
template <typename T, typename Z, typename Teacher>
MLR1_HOST_DEVICE inline void write_kl_partials(const KlSums<T>& sums, int width,
                                               std::int64_t label, bool hot, bool reverse,
                                               T inverse_temperature, const Z& z, const Teacher& t,
                                               T* out, std::int64_t stride) {
  // Zero, but NaN where the largest is not finite, as a softmax of such logits is.
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const T hurt_z = width > 0 ? sums.top_z - sums.top_z : T(0);
  const T hurt_t = width > 0 ? sums.top_t - sums.top_t : T(0);
  const T cross = (sums.cross + (reverse ? hurt_z : hurt_t)) * inverse_temperature;
  const bool is_here = label >= 0 && label < width;
  out[0] = sums.top_z;
  out[stride] = sums.top_t;
  out[2 * stride] = sums.q + hurt_z;
  out[3 * stride] = (hot ? sums.q_hot : sums.q) + hurt_z;
  out[4 * stride] = sums.p + hurt_t;
  out[5 * stride] = (hot ? sums.p_hot : sums.p) + hurt_t;
  out[6 * stride] = reverse ? T(0) : cross;
  out[7 * stride] = reverse ? cross : T(0);
  out[8 * stride] = sums.spread + hurt_t;
  out[9 * stride] = is_here ? z(label) : T(0);
  out[10 * stride] = is_here ? t(label) : T(0);
  const int first = sums.first < width ? sums.first : 0;
  out[11 * stride] = width > 0 ? z(first) : kNone;
}

// What the objective makes the same for all rows.
template <typename T>
struct KlObjective {
  T inverse_temperature;
  T log_teacher_share;  // log beta
  T log_student_share;  // log(1 - beta)
  T student_share;      // 1 - beta
};

template <typename T>
inline KlObjective<T> kl_objective(double temperature, double beta) {
  return {static_cast<T>(1 / temperature), static_cast<T>(std::log(beta)),
          static_cast<T>(std::log(1 - beta)), static_cast<T>(1 - beta)};
}

// log p'/m of gap = log q'/p'; log q'/m is gap more.
template <typename T>
MLR1_HOST_DEVICE inline T log_teacher_of_mixture(T gap, const KlObjective<T>& objective) {
  const T student = gap + objective.log_student_share;
  const T apart = student - objective.log_teacher_share;
  const T top = larger(student, objective.log_teacher_share);
  return -(top + log_one_and(exponential_of_any(apart < T(0) ? apart : -apart)));
}

template <typename T>
struct JsdTerms {
  T teacher;  // p' log p'/m
  T student;  // q' log q'/m
};

//   between   log sum exp of z / T, less that of t / T.
//   lse       log sum exp of z / T.
template <typename T>
MLR1_HOST_DEVICE inline JsdTerms<T> jsd_terms(T z, T t, T between, T lse,
                                              const KlObjective<T>& objective) {
  const T gap = (z - t) * objective.inverse_temperature - between;
  const T log_p = log_teacher_of_mixture(gap, objective);
  const T log_q = z * objective.inverse_temperature - lse;
  return {log_p * exponential_of_any(log_q - gap), (log_p + gap) * exponential_of_any(log_q)};
}

// rows_4C and weights_3C of the definition, one row of them.
template <typename T>
struct KlRow {
  T lse, hot_lse, teacher_hot_lse, centre;
  T pull, weight, kd;
};

template <typename T>
MLR1_HOST_DEVICE inline KlRow<T> kl_row(const T* rows_4C, const T* weights_3C, std::int64_t row,
                                        std::int64_t stride) {
  return {rows_4C[row],
          rows_4C[row + stride],
          rows_4C[row + 2 * stride],
          rows_4C[row + 3 * stride],
          weights_3C[row],
          weights_3C[row + stride],
          weights_3C[row + 2 * stride]};
}

template <typename T>
struct KlGradient {
  T gradient;  // but for the label's weight
  T p;         // p'
  T term;      // p' log p'/q'
};

template <bool kHot, KlDirection kDirection, typename T>
MLR1_HOST_DEVICE inline KlGradient<T> kl_gradient(T z, T t, const KlRow<T>& row,
                                                  const KlObjective<T>& objective) {
  const T log_q = z * objective.inverse_temperature - row.hot_lse;
  const T log_p = t * objective.inverse_temperature - row.teacher_hot_lse;
  const T p = exponential_of_any(log_p);
  const T q = exponential_of_any(z - row.lse);
  const T q_hot = kHot ? exponential_of_any(log_q) : q;
  const T gap = log_q - log_p;
  T follow;
  if constexpr (kDirection == KlDirection::forward) {
    follow = q_hot - p;
  } else if constexpr (kDirection == KlDirection::reverse) {
    follow = (gap - row.centre) * q_hot;
  } else {
    const T log_student = log_teacher_of_mixture(gap, objective) + gap;
    follow = (log_student - row.centre) * q_hot * objective.student_share;
  }
  return {q * row.pull + follow * row.kd, p, -(gap * p)};
}

// The forward KL(p' || q') by how likely the teacher finds an id.
template <typename T>
struct KlSplit {
  T head;
  T tail;
  T mass;  // p' of the head
};

template <typename T>
MLR1_HOST_DEVICE inline KlSplit<T> kl_split(T p, T term) {
  const T in_head = p >= T(kHeadProbability) ? T(1) : T(0);
  // Times zero, not left out: a term that is not finite shows in both, as in the definition.
  return {term * in_head, in_head > T(0) ? T(0) : term, p * in_head};
}

}  // namespace mlr1
