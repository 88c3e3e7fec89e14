// What sums over parts of a pair of rows of logits are, and how they become those of the whole: z of
// the student, t of the teacher, T the temperature (formulas: megatron_mlr1/ops/linear_kl.py). The type
// T of the arithmetic is float for fp32, bf16 and fp16 logits, double for fp64.
#pragma once

#include <climits>
#include <limits>

#include "common/math.h"

namespace mlr1 {

// Logits that are less count as none where a row's largest is sought: a finite number in any base.
template <typename T>
constexpr T kLeastLogit = std::numeric_limits<T>::lowest() / 4;

// What powers of the own base are taken relative to where `top` is the largest logit.
template <typename T>
MLR1_HOST_DEVICE inline T origin_of_powers(T top) {
  return top > kLeastLogit<T> ? top * to_own_base<T>() : kLeastLogit<T>;
}

// What the origin's rounding took off: powers relative to it are too large by so much of an exponent.
// Where the own base is 2 it stays below 2^7 for logits below 2^31, and no power overflows.
template <typename T>
MLR1_HOST_DEVICE inline T rest_of_origin(T top) {
  return top > kLeastLogit<T> ? scaled_less(top, to_own_base<T>(), origin_of_powers(top)) : T(0);
}

// Sums over some columns of a row. While they are made, powers are relative to origin_of_powers() of
// the tops, and `spread` is in the own base; told_kl_sums() makes them what the comments say.
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

//   origin_z, origin_t   origin_of_powers() of the tops.
template <bool kHot, bool kReverse, typename T>
MLR1_HOST_DEVICE inline KlTerms<T> kl_terms(T z, T t, T origin_z, T origin_t,
                                            T inverse_temperature) {
  const T student = scaled_less(z, to_own_base<T>(), origin_z);
  const T teacher = scaled_less(t, to_own_base<T>(), origin_t);
  KlTerms<T> terms;
  terms.q = power(student);
  terms.p = power(teacher);
  terms.q_hot = kHot ? power(student * inverse_temperature) : terms.q;
  terms.p_hot = kHot ? power(teacher * inverse_temperature) : terms.p;
  terms.cross = kReverse ? terms.q_hot * (z - t) : terms.p_hot * (t - z);
  terms.spread = terms.p * teacher;
  return terms;
}

template <bool kHot = true, typename T>
MLR1_HOST_DEVICE inline void add_kl_terms(KlSums<T>& sums, const KlTerms<T>& terms) {
  sums.q += terms.q;
  sums.p += terms.p;
  if (kHot) {
    sums.q_hot += terms.q_hot;
    sums.p_hot += terms.p_hot;
  }
  sums.cross += terms.cross;
  sums.spread += terms.spread;
}

// Makes sums relative to larger tops.
template <bool kHot, bool kReverse, typename T>
MLR1_HOST_DEVICE inline void raise_kl_tops(KlSums<T>& sums, T top_z, T top_t,
                                           T inverse_temperature) {
  const T shift_z = origin_of_powers(sums.top_z) - origin_of_powers(top_z);
  const T shift_t = origin_of_powers(sums.top_t) - origin_of_powers(top_t);
  const T factor_z = power(shift_z);
  const T factor_t = power(shift_t);
  const T hot_z = kHot ? power(shift_z * inverse_temperature) : factor_z;
  const T hot_t = kHot ? power(shift_t * inverse_temperature) : factor_t;
  sums.q *= factor_z;
  // The factor is zero long before the bound: without it the product could be infinite, and NaN.
  sums.spread = (sums.spread + larger(shift_t, T(-1e4)) * sums.p) * factor_t;
  sums.p *= factor_t;
  if (kHot) {
    sums.q_hot *= hot_z;
    sums.p_hot *= hot_t;
  }
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
  add_kl_terms<kHot>(a, KlTerms<T>{b.q, b.q_hot, b.p, b.p_hot, b.cross, b.spread});
  return a;
}

// Sums as others take them: not a number where the largest logit is not finite, as a softmax of
// such logits is; q_hot and p_hot at temperature 1 too; the cross sum of z / T and t / T.
template <typename T>
MLR1_HOST_DEVICE inline KlSums<T> told_kl_sums(KlSums<T> sums, int width, bool hot, bool reverse,
                                               T inverse_temperature) {
  const T hurt_z = width > 0 ? sums.top_z - sums.top_z : T(0);
  const T hurt_t = width > 0 ? sums.top_t - sums.top_t : T(0);
  const T rest_z = rest_of_origin(sums.top_z);
  const T rest_t = rest_of_origin(sums.top_t);
  const T factor_t = power(-rest_t);
  sums.q *= power(-rest_z);
  sums.spread = (sums.spread - rest_t * sums.p) * (factor_t * to_natural<T>());
  sums.p *= factor_t;
  if (hot) {
    sums.q_hot *= power(-rest_z * inverse_temperature);
    sums.p_hot *= power(-rest_t * inverse_temperature);
  }
  sums.cross *= power(-(reverse ? rest_z : rest_t) * (hot ? inverse_temperature : T(1)));
  sums.q_hot = (hot ? sums.q_hot : sums.q) + hurt_z;
  sums.p_hot = (hot ? sums.p_hot : sums.p) + hurt_t;
  sums.q += hurt_z;
  sums.p += hurt_t;
  sums.cross = (sums.cross + (reverse ? hurt_z : hurt_t)) * inverse_temperature;
  sums.spread += hurt_t;
  sums.first = sums.first < width ? sums.first : 0;
  return sums;
}

}  // namespace mlr1
