// Scalar primitives and conventions of the core.
//
// The core is templated on F, the type of a lane group: float here and in CUDA, a SIMD vector in the CPU kernels.
// Such a type brings the operators + - * / > and, found by argument-dependent lookup, the functions exp2, log2, abs
// and select declared below for float.
//
// Conventions, kept everywhere:
//   -inf is a masked column: its exponential is exactly 0 and whatever it multiplies counts as 0;
//   exponents are relative to a maximum, so they never exceed rounding of 0; NaN is never filtered out.
#pragma once

#include <cmath>

#include "macros.h"

namespace fastkd {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kEpsilon = 1.1920929e-7f;  // from 1 to the next float

FASTKD_FN float minus_infinity() { return -static_cast<float>(INFINITY); }

FASTKD_FN float exp2(float x) { return ::exp2f(x); }
FASTKD_FN float log2(float x) { return ::log2f(x); }
FASTKD_FN float abs(float x) { return ::fabsf(x); }
FASTKD_FN float select(bool take_a, float a, float b) { return take_a ? a : b; }
FASTKD_FN float max(float a, float b) { return a > b ? a : b; }  // b where either is NaN
FASTKD_FN float min(float a, float b) { return a < b ? a : b; }  // b where either is NaN

// weight * value, and 0 where the weight is 0 even if the value is infinite or NaN.
template <class F>
FASTKD_FN F weigh(F weight, F value) {
  return select(weight > F(0.0f), weight * value, F(0.0f));
}

// Logits to exponents of 2: y = (logit - reference) * slope, with slope = log2(e) / T and the reference a maximum. The
// difference comes first: it is exact beside the maximum, where y is exactly 0 and 2^y exactly 1.
template <class F>
struct Exponent {
  F reference, slope;

  FASTKD_METHOD F operator()(F logit) const { return (logit - reference) * slope; }
};

// A reference that can be subtracted: an all-masked piece has maximum -inf, and -inf - -inf would be NaN.
FASTKD_FN float finite_reference(float reference) { return reference == minus_infinity() ? 0.0f : reference; }

}  // namespace fastkd
