// The divergences: term(lp, lq) and dlogq(lp, lq) = d term / d lq (DESIGN section 1). p is always the teacher.
#pragma once

#include "numerics.h"

namespace fastkd {

enum class Divergence { forward_kl, reverse_kl, symmetric_kl, jsd, total_variation, skew_forward_kl, skew_reverse_kl };

// One column of both models. `ratio` = lp - lq in nats; NaN where both are masked, where p = q = 0.
template <class F>
struct Column {
  F p, q, ratio;
};

template <class F>
struct Term {
  F value, dlogq;
};

// Logs of the mixture m = share p + (1 - share) q relative to both models. One exponential of -|ratio| and one log of
// a number in [min(share, 1 - share), 1]: nothing can underflow before its logarithm is taken.
template <class F>
struct Mixture {
  F lp_minus_lm, lq_minus_lm, q_over_m;

  FASTKD_METHOD Mixture(const Column<F>& c, float share) {
    const auto teacher_larger = c.ratio > F(0.0f);
    const F smaller_over_larger = exp2(F(-kLog2e) * abs(c.ratio));
    const F own = select(teacher_larger, F(share), F(1.0f - share));
    const F other = F(1.0f) - own;
    const F m_over_larger = own + other * smaller_over_larger;
    const F log_m = F(kLn2) * log2(m_over_larger);  // relative to the larger of lp and lq
    const F zero = F(0.0f);
    lp_minus_lm = select(teacher_larger, zero, c.ratio) - log_m;
    lq_minus_lm = select(teacher_larger, zero - c.ratio, zero) - log_m;
    q_over_m = select(teacher_larger, smaller_over_larger, F(1.0f)) / m_over_larger;
  }
};

template <Divergence>
struct DivergenceTerm;

template <>
struct DivergenceTerm<Divergence::forward_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float) {
    return {weigh(c.p, c.ratio), F(0.0f) - c.p};
  }
};

template <>
struct DivergenceTerm<Divergence::reverse_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float) {
    return {weigh(c.q, F(0.0f) - c.ratio), weigh(c.q, F(1.0f) - c.ratio)};
  }
};

template <>
struct DivergenceTerm<Divergence::symmetric_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta) {
    const F forward = F(beta), reverse = F(1.0f - beta);
    return {forward * weigh(c.p, c.ratio) + reverse * weigh(c.q, F(0.0f) - c.ratio),
            reverse * weigh(c.q, F(1.0f) - c.ratio) - forward * c.p};
  }
};

template <>
struct DivergenceTerm<Divergence::total_variation> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float) {
    const F half_q = F(0.5f) * c.q, zero = F(0.0f);
    const F dlogq = select(c.p > c.q, zero - half_q, select(c.q > c.p, half_q, zero));  // 0 at a tie
    // a NaN probability takes neither side, so the value, not the gradient, carries it to the row's sums
    return {F(0.5f) * abs(c.p - c.q), dlogq};
  }
};

template <>
struct DivergenceTerm<Divergence::jsd> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta) {
    const Mixture<F> m(c, beta);
    const F student = F(1.0f - beta) * weigh(c.q, m.lq_minus_lm);
    return {F(beta) * weigh(c.p, m.lp_minus_lm) + student, student};
  }
};

template <>
struct DivergenceTerm<Divergence::skew_forward_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta) {
    const Mixture<F> m(c, beta);
    return {weigh(c.p, m.lp_minus_lm), F(beta - 1.0f) * weigh(c.p, m.q_over_m)};
  }
};

template <>
struct DivergenceTerm<Divergence::skew_reverse_kl> {
  template <class F>
  FASTKD_METHOD static Term<F> at(const Column<F>& c, float beta) {
    const Mixture<F> m(c, 1.0f - beta);
    return {weigh(c.q, m.lq_minus_lm), weigh(c.q, m.lq_minus_lm + (F(1.0f) - F(beta) * m.q_over_m))};
  }
};

}  // namespace fastkd
