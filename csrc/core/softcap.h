// s <- c tanh(s / c) and its derivative, for any lane group F. -inf stays a mask.
#pragma once

#include "numerics.h"

namespace fastkd {

// tanh x, relative error below 2e-7: an odd polynomial near 0, exponentials beyond. Minimax fit.
template <class F>
FASTKD_FN F tanh_of(F x) {
  const F size = abs(x), square = x * x, one = F(1.0f), zero = F(0.0f);
  F p = F(-0.0056599886156618595f) * square + F(0.02059098891913891f);
  p = p * square + F(-0.05372106656432152f);
  p = p * square + F(0.13331127166748047f);
  p = p * square + F(-0.3333325982093811f);
  const F near = x + x * square * p;
  const F e = exp2(F(-2.0f * kLog2e) * size);
  const F far = divide(one - e, one + e);
  return select(size > F(0.625f), select(x > zero, far, zero - far), near);
}

template <class F>
FASTKD_FN F softcapped(F logit, F cap, F inverse_cap) {
  return select(logit > F(minus_infinity()), cap * tanh_of(logit * inverse_cap), logit);
}

// The factor of a column's gradient: 1 - (s / c)^2 of the capped logit s, and 1 at a mask.
template <class F>
FASTKD_FN F softcap_slope(F capped, F inverse_cap) {
  const F u = capped * inverse_cap, one = F(1.0f);
  return select(capped > F(minus_infinity()), one - u * u, one);
}

}  // namespace fastkd
