// Scalar primitives and conventions of the core.
//
// The core is templated on F, the type of a lane group: float here and in CUDA, a SIMD vector in the CPU kernels.
// Such a type brings the operators + - * > and, found by argument-dependent lookup, the functions exp2, log2, divide,
// abs and select declared below for float.
//
// Conventions, kept everywhere:
//   -inf is a masked column: its exponential is exactly 0 and whatever it multiplies counts as 0;
//   exponents are relative to a maximum, so they never exceed rounding of 0; NaN is never filtered out.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace fastkd {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kEpsilon = 1.1920929e-7f;  // from 1 to the next float

FASTKD_FN float minus_infinity() { return -static_cast<float>(INFINITY); }

// exp2 and log2 run once or more a column. On a GPU they are the special-function unit's own instructions (within
// 2^-22), which treat subnormal numbers as 0, as the conventions above allow.
#if defined(__CUDA_ARCH__)
FASTKD_FN float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTKD_FN float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTKD_FN float divide(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
}
#else
FASTKD_FN float exp2(float x) { return ::exp2f(x); }
FASTKD_FN float log2(float x) { return ::log2f(x); }
FASTKD_FN float divide(float a, float b) { return a / b; }
#endif
FASTKD_FN float log2_of_row(float x) { return ::log2f(x); }  // a few a row: exact to the last place
FASTKD_FN float abs(float x) { return ::fabsf(x); }
FASTKD_FN float select(bool take_a, float a, float b) { return take_a ? a : b; }
// b where either is NaN; on a GPU, whose own instructions these are, the one that is a number.
#if defined(__CUDA_ARCH__)
FASTKD_FN float max(float a, float b) { return ::fmaxf(a, b); }
FASTKD_FN float min(float a, float b) { return ::fminf(a, b); }
#else
FASTKD_FN float max(float a, float b) { return a > b ? a : b; }
FASTKD_FN float min(float a, float b) { return a < b ? a : b; }
#endif

// 2^f for |f| <= 1/2: minimax polynomial.
FASTKD_FN float exp2_of_fraction(float f) {
  float p = 0.001327647129073739f * f + 0.009675540961325169f;
  p = p * f + 0.05550713092088699f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  return p * f + 1.0f;
}

// 2^x for x <= 127 by multiplications and additions alone, relative error below 3e-7; 0 below 2^-126, NaN stays NaN.
// Where the special-function unit is the bottleneck, a part of the exponentials goes this way.
FASTKD_FN float exp2_by_polynomial(float x) {
  const float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer n, kept with the bias 127
  x = x < -127.0f ? -127.0f : x;             // n + 127 = 0 is the factor 0.0
  const float shifted = x + shift;
  const float p = exp2_of_fraction(x - (shifted - shift));
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The same for -125 <= x <= 125, where 2^n needs no factor of its own: n is added to the polynomial's exponent.
FASTKD_FN float exp2_by_polynomial_between(float x) {
  const float shift = 12582912.0f;
  const float shifted = x + shift;
  const float p = exp2_of_fraction(x - (shifted - shift));
  uint32_t bits, n;
  __builtin_memcpy(&bits, &p, sizeof bits);
  __builtin_memcpy(&n, &shifted, sizeof n);
  bits += n << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

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
