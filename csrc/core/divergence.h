// The divergences (DESIGN section 1). p is always the teacher, q the student.
//
// Two families. The mixed Kullback-Leibler divergences  w KL(p||q) + (1 - w) KL(q||p)  have their value from one sweep
// and a gradient that is linear in p, q and q (lp - lq): row.h holds them whole. The others are a term and its
// derivative per column, below, and need both softmax denominators before their terms can be summed.
#pragma once

#include "numerics.h"

namespace fastkd {

enum class Divergence { forward_kl, reverse_kl, symmetric_kl, jsd, total_variation, skew_forward_kl, skew_reverse_kl };

FASTKD_FN bool is_mixed_kl(Divergence d) {
  return d == Divergence::forward_kl || d == Divergence::reverse_kl || d == Divergence::symmetric_kl;
}

// One column of both models. log2_ratio = log2(p / q), bounded: a masked column has an infinite ratio and the
// probability 0, and a large finite one makes their product 0. Where both are masked it is any number.
template <class F>
struct Column {
  F p, q, log2_ratio, smaller_over_larger;  // the last of p and q

  FASTKD_METHOD static F bounded(F log2_ratio) {
    const F limit = F(1e30f);
    return max(min(log2_ratio, limit), F(0.0f) - limit);
  }

  // where the probabilities are at hand
  FASTKD_METHOD static Column of_probabilities(F p, F q, F log2_ratio) {
    const F ratio = bounded(log2_ratio);
    return {p, q, ratio, exp2(F(0.0f) - abs(ratio))};
  }
};

// where only their logarithms are: one exponential for the larger of p and q, and one of the ratio, which may go by the
// polynomial
template <bool kPolynomial>
FASTKD_FN Column<float> column_of_logs(float log2_p, float log2_q) {
  const float ratio = Column<float>::bounded(log2_p - log2_q);
  const float smaller = kPolynomial ? exp2_by_polynomial(-abs(ratio)) : exp2(-abs(ratio));
  const float larger_probability = exp2(max(log2_p, log2_q)), other = larger_probability * smaller;
  const bool teacher_larger = ratio > 0.0f;
  return {teacher_larger ? larger_probability : other, teacher_larger ? other : larger_probability, ratio, smaller};
}

// term(lp, lq) and dlogq = d term / d lq, both in units of ln 2: logarithms are base 2 until the row's sums are known.
template <class F>
struct Term {
  F value, dlogq;
};

// Logs of the mixture m = share p + (1 - share) q relative to both models, base 2, from the log of a number in
// [min(share, 1 - share), 1]: nothing can underflow before its logarithm is taken.
template <class F>
struct Mixture {
  F log2_p_over_m, log2_m_over_q, q_over_m;

  FASTKD_METHOD Mixture(const Column<F>& c, float share, float rest) {  // rest = 1 - share
    const F zero = F(0.0f), one = F(1.0f);
    const F above = max(c.log2_ratio, zero), below = min(c.log2_ratio, zero);
    const auto teacher_larger = c.log2_ratio > zero;
    const F own = select(teacher_larger, F(share), F(rest)), other = select(teacher_larger, F(rest), F(share));
    const F m_over_larger = own + other * c.smaller_over_larger;
    const F log2_m = log2(m_over_larger);  // relative to the larger of p and q
    log2_p_over_m = below - log2_m;
    log2_m_over_q = above + log2_m;
    q_over_m = divide(select(teacher_larger, c.smaller_over_larger, one), m_over_larger);
  }
};

// beta and rest = 1 - beta of the public function.
template <Divergence>
struct DivergenceTerm;

template <>
struct DivergenceTerm<Divergence::jsd> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta, float rest) {
    const Mixture<F> m(c, beta, rest);
    const F student = F(-rest) * c.q * m.log2_m_over_q;
    return {F(beta) * c.p * m.log2_p_over_m + student, student};
  }
};

template <>
struct DivergenceTerm<Divergence::total_variation> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float, float) {
    const F zero = F(0.0f), half = F(0.5f * kLog2e), half_q = half * c.q, difference = c.p - c.q;
    // 0 at a tie, which the rounding of the two denominators must not turn into a side; NaN is no tie
    const F rounding = F(4.0f * kEpsilon) * (c.p + c.q), size = abs(difference);
    const auto tie = rounding > size;
    const F dlogq = select(difference > zero, zero - half_q, half_q);
    return {select(tie, zero, half * size), select(tie, zero, dlogq)};
  }
};

template <>
struct DivergenceTerm<Divergence::skew_forward_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta, float rest) {
    const Mixture<F> m(c, beta, rest);
    return {c.p * m.log2_p_over_m, F(-rest * kLog2e) * c.p * m.q_over_m};
  }
};

template <>
struct DivergenceTerm<Divergence::skew_reverse_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta, float rest) {
    const Mixture<F> m(c, rest, beta);
    const F value = F(0.0f) - c.q * m.log2_m_over_q;
    return {value, value + F(kLog2e) * c.q * (F(1.0f) - F(beta) * m.q_over_m)};
  }
};

}  // namespace fastkd
