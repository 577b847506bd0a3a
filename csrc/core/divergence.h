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

// Where exponentials are not kept and each costs a special function, float alone: a column by the logarithms of its
// probabilities, with as few of them as the divergence needs. What multiplies p or q is a function of their ratio,
// which is bounded: beyond 2^120 the smaller of the two, even as a normal number, is nothing beside the larger.
constexpr float kMostRatio = 120.0f;
FASTKD_FN float bounded_ratio(float log2_ratio) { return max(min(log2_ratio, kMostRatio), -kMostRatio); }
constexpr float kTieRatio = 8.0f * kEpsilon * kLog2e;  // of log2 p - log2 q: 4 epsilon (p + q) as a difference

// slope: dlogq / (q * scale). term: both. Where either is unbounded in p / q, the probability that multiplies it is 0
// there.
template <Divergence>
struct LogTerm;

template <>
struct LogTerm<Divergence::jsd> {
  FASTKD_METHOD static float slope(float log2_p, float log2_q, float beta, float rest) {
    return log2(beta * exp2(min(log2_p - log2_q, kMostRatio)) + rest);
  }
  FASTKD_METHOD static float scale(float rest) { return -rest; }
  // By the larger of p and q: the mixture over it cannot underflow.
  FASTKD_METHOD static Term<float> term(float log2_p, float log2_q, float beta, float rest) {
    const float ratio = log2_p - log2_q, distance = min(abs(ratio), kMostRatio);
    const bool teacher_larger = ratio > 0.0f;
    const float larger = exp2(max(log2_p, log2_q)), smaller = exp2_by_polynomial_between(-distance);  // over larger
    const float own = teacher_larger ? beta : rest, other_smaller = (teacher_larger ? rest : beta) * smaller;
    const float m = own + other_smaller, log2_m = log2(m);
    const float q = larger * (teacher_larger ? smaller : 1.0f);
    const float log2_m_over_q = log2_m + (teacher_larger ? distance : 0.0f);
    return {-larger * (m * log2_m + other_smaller * distance), -rest * (q * log2_m_over_q)};
  }
};

template <>
struct LogTerm<Divergence::total_variation> {
  FASTKD_METHOD static float slope(float log2_p, float log2_q, float, float) {
    const float ratio = log2_p - log2_q;
    return abs(ratio) < kTieRatio ? 0.0f : ratio > 0.0f ? -1.0f : 1.0f;
  }
  FASTKD_METHOD static float scale(float) { return 0.5f * kLog2e; }
  FASTKD_METHOD static Term<float> term(float log2_p, float log2_q, float beta, float rest) {
    const float q = exp2(log2_q), side = slope(log2_p, log2_q, beta, rest), half = scale(rest);
    return {side == 0.0f ? 0.0f : half * abs(exp2(log2_p) - q), half * q * side};
  }
};

template <>
struct LogTerm<Divergence::skew_forward_kl> {
  FASTKD_METHOD static float slope(float log2_p, float log2_q, float beta, float rest) {
    const float ratio = exp2_by_polynomial_between(bounded_ratio(log2_p - log2_q));
    return divide(ratio, beta * ratio + rest);
  }
  FASTKD_METHOD static float scale(float rest) { return -rest * kLog2e; }
  FASTKD_METHOD static Term<float> term(float log2_p, float log2_q, float beta, float rest) {
    const float ratio = exp2_by_polynomial_between(bounded_ratio(log2_q - log2_p)), m = rest * ratio + beta;  // over p
    const float p = exp2(log2_p);
    return {-p * log2(m), scale(rest) * (p * divide(ratio, m))};
  }
};

template <>
struct LogTerm<Divergence::skew_reverse_kl> {
  FASTKD_METHOD static Term<float> over_q(float log2_p, float log2_q, float beta, float rest) {
    const float m = rest * exp2_by_polynomial_between(bounded_ratio(log2_p - log2_q)) + beta, log2_m = log2(m);
    return {-log2_m, kLog2e - log2_m - divide(beta * kLog2e, m)};
  }
  FASTKD_METHOD static float slope(float log2_p, float log2_q, float beta, float rest) {
    return over_q(log2_p, log2_q, beta, rest).dlogq;
  }
  FASTKD_METHOD static float scale(float) { return 1; }
  FASTKD_METHOD static Term<float> term(float log2_p, float log2_q, float beta, float rest) {
    const Term<float> t = over_q(log2_p, log2_q, beta, rest);
    const float q = exp2(log2_q);
    return {q * t.value, q * t.dlogq};
  }
};

}  // namespace fastkd
