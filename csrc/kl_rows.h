// Row arithmetic of the ops of megatron_mlr1/ops/kl_rows.py: what one pair of logits adds, how sums
// over parts of a row become one, what they say of the row, what they are written as.
// Formulas and names stand in megatron_mlr1/ops/linear_kl.py: z of the student, t of the teacher.
// T is the type of the arithmetic: float for fp32, bf16 and fp16 logits, double for fp64.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/kl_sums.h"
#include "common/math.h"

namespace mlr1 {

constexpr int kKlPartials = 12;
constexpr int kKlStatistics = 9;

// HEAD_PROBABILITY of the definition.
constexpr double kHeadProbability = 1.0 / 1024;

enum class KlDirection { forward, reverse, jsd };

// Logarithm to the own base of 1 + y, y of [0, 1]. On the host as 2 artanh(s) = 2 (s + s^3 / 3 + ...)
// with s = y / (2 + y) <= 1/3, up to terms below half a unit of the type. On the device in fp32 by the
// one instruction for log2, which is off by 2^-22 at most: with the rounding of 1 + y, 3.3e-7 in all.
template <typename T>
MLR1_HOST_DEVICE inline T log_one_and(T y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(1.0f + y));
    return log2;
  } else {
    return log1p(y);
  }
#else
  constexpr int kTerms = sizeof(T) == sizeof(double) ? 17 : 8;
  const T s = y / (T(2) + y);
  T p = T(1) / T(2 * kTerms + 1);
  for (int k = kTerms - 1; k >= 0; --k) {
    p = p * (s * s) + T(1) / T(2 * k + 1);
  }
  return T(2) * s * p * to_own_base<T>();
#endif
}

// A logit in the type of the arithmetic; zero where the column is in another shard.
template <typename T, typename scalar_t>
MLR1_HOST_DEVICE inline T logit_at_label(const scalar_t* logits, std::int64_t label, int width) {
  return label >= 0 && label < width ? static_cast<T>(logits[label]) : T(0);
}

// Writes one row's partials to out[0], out[stride], ... out[11 * stride].
//   told   sums as others take them
//   z, t   the row's logits
template <typename T, typename scalar_t>
MLR1_HOST_DEVICE inline void write_kl_partials(const KlSums<T>& told, int width,
                                               std::int64_t label, bool reverse, const scalar_t* z,
                                               const scalar_t* t, T* out, std::int64_t stride) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  out[0] = told.top_z;
  out[stride] = told.top_t;
  out[2 * stride] = told.q;
  out[3 * stride] = told.q_hot;
  out[4 * stride] = told.p;
  out[5 * stride] = told.p_hot;
  out[6 * stride] = reverse ? T(0) : told.cross;
  out[7 * stride] = reverse ? told.cross : T(0);
  out[8 * stride] = told.spread;
  out[9 * stride] = logit_at_label<T>(z, label, width);
  out[10 * stride] = logit_at_label<T>(t, label, width);
  out[11 * stride] = width > 0 ? static_cast<T>(z[told.first]) : kNone;
}

// What the sums over a whole row make known of it.
template <typename T>
struct KlKnown {
  T lse;              // log sum exp of z
  T hot_lse;          // of z / T
  T teacher_lse;      // of t
  T teacher_hot_lse;  // of t / T
  T between;          // hot_lse - teacher_hot_lse
  T divergence;       // D; of the jsd, once its halves are known
  T teacher_mean;     // of t under p
};

template <typename T>
MLR1_HOST_DEVICE inline KlKnown<T> kl_known(const KlSums<T>& told, bool reverse,
                                            T inverse_temperature) {
  KlKnown<T> known;
  known.lse = told.top_z + std::log(told.q);
  known.hot_lse = told.top_z * inverse_temperature + std::log(told.q_hot);
  known.teacher_lse = told.top_t + std::log(told.p);
  known.teacher_hot_lse = told.top_t * inverse_temperature + std::log(told.p_hot);
  known.between = known.hot_lse - known.teacher_hot_lse;
  known.divergence =
      reverse ? told.cross / told.q_hot - known.between : told.cross / told.p_hot + known.between;
  known.teacher_mean = told.top_t + told.spread / told.p;
  return known;
}

// 1 where the teacher's first choice, whose z is given, is one of the student's.
template <typename T>
MLR1_HOST_DEVICE inline T kl_agreement(const KlSums<T>& told, T z) {
  const bool is_finite = told.top_t - told.top_t == T(0);
  return is_finite && z == told.top_z ? T(1) : T(0);
}

// What the objective makes the same for all rows.
template <typename T>
struct KlObjective {
  T inverse_temperature;
  T log_teacher_share;  // log beta
  T log_student_share;  // log(1 - beta)
  T teacher_share;      // beta
  T student_share;      // 1 - beta
};

template <typename T>
inline KlObjective<T> kl_objective(double temperature, double beta) {
  return {static_cast<T>(1 / temperature), static_cast<T>(std::log(beta)),
          static_cast<T>(std::log(1 - beta)), static_cast<T>(beta), static_cast<T>(1 - beta)};
}

// The same with logarithms and z / T in the own base.
template <typename T>
MLR1_HOST_DEVICE inline KlObjective<T> in_own_base(KlObjective<T> objective) {
  objective.inverse_temperature *= to_own_base<T>();
  objective.log_teacher_share *= to_own_base<T>();
  objective.log_student_share *= to_own_base<T>();
  return objective;
}

// log p'/m of gap = log q'/p'; log q'/m is gap more. All in the own base.
template <typename T>
MLR1_HOST_DEVICE inline T log_teacher_of_mixture(T gap, const KlObjective<T>& objective) {
  const T student = gap + objective.log_student_share;
  const T apart = student - objective.log_teacher_share;
  const T top = larger(student, objective.log_teacher_share);
  return -(top + log_one_and(power(-std::fabs(apart))));
}

template <typename T>
struct JsdTerms {
  T teacher;  // p' log p'/m
  T student;  // q' log q'/m
};

// In the own base, and so are
//   between   log sum exp of z / T, less that of t / T.
//   lse       log sum exp of z / T.
template <typename T>
MLR1_HOST_DEVICE inline JsdTerms<T> jsd_terms(T z, T t, T between, T lse,
                                              const KlObjective<T>& objective) {
  const T gap = scaled_less(z - t, objective.inverse_temperature, between);
  const T log_p = log_teacher_of_mixture(gap, objective);
  const T log_q = scaled_less(z, objective.inverse_temperature, lse);
  return {log_p * power(log_q - gap), (log_p + gap) * power(log_q)};
}

// Halves of the JSD, of sums of their terms.
template <typename T>
MLR1_HOST_DEVICE inline JsdTerms<T> told_jsd_terms(const JsdTerms<T>& sums) {
  return {sums.teacher * to_natural<T>(), sums.student * to_natural<T>()};
}

// The JSD of a row of its halves.
template <typename T>
MLR1_HOST_DEVICE inline T jsd_of(const JsdTerms<T>& halves, const KlObjective<T>& objective) {
  return objective.teacher_share * halves.teacher + objective.student_share * halves.student;
}

// rows_4C and weights_3C of the definition, one row of them.
template <typename T>
struct KlRow {
  T lse, hot_lse, teacher_hot_lse, centre;
  T pull, weight, kd;

  // A row that weighs nothing has a gradient of zeros, whatever its logits are.
  MLR1_HOST_DEVICE bool is_idle() const { return pull == 0 && weight == 0 && kd == 0; }
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

// What the whole loss is made of, but for the objective.
template <typename T>
struct KlLoss {
  T temperature;
  T z_loss;
};

//   centre   what g takes off: D of the reverse direction, KL(q' || m) of the jsd
template <typename T>
MLR1_HOST_DEVICE inline KlRow<T> kl_row(const KlKnown<T>& known, T centre, T cross_entropy,
                                        T divergence, const KlLoss<T>& loss) {
  const T pull = cross_entropy * (T(1) + T(2) * loss.z_loss * known.lse);
  return {known.lse,
          known.hot_lse,
          known.teacher_hot_lse,
          centre,
          cross_entropy == 0 ? T(0) : pull,
          cross_entropy,
          divergence * loss.temperature};
}

// The same with logarithms in the own base, and a kd that takes what follows from them back.
template <KlDirection kDirection, typename T>
MLR1_HOST_DEVICE inline KlRow<T> in_own_base(KlRow<T> row) {
  row.lse *= to_own_base<T>();
  row.hot_lse *= to_own_base<T>();
  row.teacher_hot_lse *= to_own_base<T>();
  row.centre *= to_own_base<T>();
  row.kd *= kDirection == KlDirection::forward ? T(1) : to_natural<T>();
  return row;
}

template <typename T>
struct KlGradient {
  T gradient;  // but for the label's weight
  T p;         // p'
  T term;      // p' log p'/q', in the own base
};

//   row, objective   in the own base; at temperature 1, lse and hot_lse are the same.
template <bool kHot, KlDirection kDirection, typename T>
MLR1_HOST_DEVICE inline KlGradient<T> kl_gradient(T z, T t, const KlRow<T>& row,
                                                  const KlObjective<T>& objective) {
  const T log_q = scaled_less(z, objective.inverse_temperature, row.hot_lse);
  const T log_p = scaled_less(t, objective.inverse_temperature, row.teacher_hot_lse);
  const T p = power(log_p);
  const T q_hot = power(log_q);
  const T q = kHot ? power(scaled_less(z, to_own_base<T>(), row.lse)) : q_hot;
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

//   p, term   as in KlGradient.
template <typename T>
MLR1_HOST_DEVICE inline void add_to_kl_split(KlSplit<T>& split, T p, T term) {
  const bool in_tail = p < T(kHeadProbability);
  split.mass = in_tail ? split.mass : split.mass + p;
  split.head = in_tail ? split.head : split.head + term;
  split.tail = in_tail ? split.tail + term : split.tail;
}

// The split of a row as others take it: what is not finite shows as in the definition, which takes
// terms and p' of other ids times zero, and a p' that is not a number as one of the tail.
template <typename T>
MLR1_HOST_DEVICE inline KlSplit<T> told_kl_split(const KlSplit<T>& sums) {
  return {(sums.head + T(0) * sums.tail) * to_natural<T>(),
          (sums.tail + T(0) * sums.mass) * to_natural<T>(), sums.mass};
}

// The statistics of a row that are known before its gradient, to out[0] .. out[4 * stride].
template <typename T>
MLR1_HOST_DEVICE inline void write_kl_known(const KlKnown<T>& known, T label_z, T label_t, T* out,
                                            std::int64_t stride) {
  out[0] = known.lse;
  out[stride] = known.lse - label_z;
  out[2 * stride] = known.divergence;
  out[3 * stride] = known.teacher_lse - known.teacher_mean;
  out[4 * stride] = known.teacher_lse - label_t;
}

template <typename T>
MLR1_HOST_DEVICE inline void write_kl_split(const KlSplit<T>& sums, T* out, std::int64_t stride) {
  const KlSplit<T> split = told_kl_split(sums);
  out[0] = split.head;
  out[stride] = split.tail;
  out[2 * stride] = split.mass;
}

}  // namespace mlr1
