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

// One column of both models. log2_ratio = log2(p / q): infinite where one is masked, NaN where both are.
template <class F>
struct Column {
  F p, q, log2_ratio;
};

// term(lp, lq) and dlogq = d term / d lq, both in units of ln 2: logarithms are base 2 until the row's sums are known.
template <class F>
struct Term {
  F value, dlogq;
};

// Logs of the mixture m = share p + (1 - share) q relative to both models, base 2. One exponential of -|log2_ratio| and
// one log of a number in [min(share, 1 - share), 1]: nothing can underflow before its logarithm is taken.
template <class F>
struct Mixture {
  F log2_p_over_m, log2_m_over_q, q_over_m;

  FASTKD_METHOD Mixture(const Column<F>& c, float share, float rest) {  // rest = 1 - share
    // A masked column has an infinite ratio and the probability 0; a large finite one makes their product 0. NaN, where
    // both models are masked, becomes any number: both probabilities are 0 there.
    const F limit = F(1e30f), zero = F(0.0f), one = F(1.0f);
    const F ratio = max(min(c.log2_ratio, limit), zero - limit);
    const F above = max(ratio, zero), below = min(ratio, zero);
    const auto teacher_larger = ratio > zero;
    const F smaller_over_larger = exp2(below - above);
    const F own = select(teacher_larger, F(share), F(rest)), other = select(teacher_larger, F(rest), F(share));
    const F m_over_larger = own + other * smaller_over_larger;
    const F log2_m = log2(m_over_larger);  // relative to the larger of p and q
    log2_p_over_m = below - log2_m;
    log2_m_over_q = above + log2_m;
    q_over_m = select(teacher_larger, smaller_over_larger, one) / m_over_larger;
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
