// Lanes of float by GCC vector extensions, at the native width of the instruction set this file is compiled for.
// Everything has internal linkage: see core/macros.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../core/numerics.h"

namespace fastkd {
namespace {

// the scalar overloads, beside those for lanes
using fastkd::abs;
using fastkd::divide;
using fastkd::exp2;
using fastkd::log2;
using fastkd::max;
using fastkd::min;
using fastkd::select;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

struct Mask {
  IntLanes lanes;  // -1 where true
};

struct Vec {
  FloatLanes v;

  FASTKD_METHOD Vec() = default;
  FASTKD_METHOD Vec(FloatLanes lanes) : v(lanes) {}
  FASTKD_METHOD explicit Vec(float x) : v(x - FloatLanes{}) {}  // x - 0 keeps -0 and -inf

  FASTKD_METHOD static Vec load(const float* p) {
    Vec x;
    std::memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  FASTKD_METHOD void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  FASTKD_METHOD Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
};

FASTKD_FN Vec operator+(Vec a, Vec b) { return a.v + b.v; }
FASTKD_FN Vec operator-(Vec a, Vec b) { return a.v - b.v; }
FASTKD_FN Vec operator*(Vec a, Vec b) { return a.v * b.v; }
FASTKD_FN Vec operator/(Vec a, Vec b) { return a.v / b.v; }
FASTKD_FN Vec divide(Vec a, Vec b) { return a / b; }
FASTKD_FN Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
FASTKD_FN Vec select(Mask m, Vec a, Vec b) { return m.lanes ? a.v : b.v; }
FASTKD_FN Vec abs(Vec a) { return (FloatLanes)((IntLanes)a.v & 0x7fffffff); }

// b where either is NaN, as in the x86 instructions.
FASTKD_FN Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_max_ps((__m512)a.v, (__m512)b.v);
#elif defined(__AVX2__)
  return (FloatLanes)_mm256_max_ps((__m256)a.v, (__m256)b.v);
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
FASTKD_FN Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_min_ps((__m512)a.v, (__m512)b.v);
#elif defined(__AVX2__)
  return (FloatLanes)_mm256_min_ps((__m256)a.v, (__m256)b.v);
#else
  return a.v < b.v ? a.v : b.v;
#endif
}

// 2^x for x <= 127, relative error below 3e-7; 0 far below, NaN stays NaN. Minimax polynomials of degree 5.
FASTKD_FN Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // 2^floor(x) comes with the instruction that applies it, which also turns -inf into 0
  const Vec f((FloatLanes)_mm512_reduce_ps((__m512)x.v, _MM_FROUND_TO_NEG_INF));
  Vec p = Vec(0.0018671300495043397f) * f + Vec(0.009017030708491802f);
  p = p * f + Vec(0.05579991266131401f);
  p = p * f + Vec(0.24016444385051727f);
  p = p * f + Vec(0.6931512951850891f);
  p = p * f + Vec(1.0f);
  return (FloatLanes)_mm512_scalef_ps((__m512)p.v, (__m512)x.v);
#else
  const float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer n, kept with the bias 127
  x = max(Vec(-127.0f), x);                  // n + 127 = 0 is the factor 0.0
  const Vec shifted = x + Vec(shift);
  const Vec f = x - (shifted - Vec(shift));
  Vec p = Vec(0.001327647129073739f) * f + Vec(0.009675540961325169f);
  p = p * f + Vec(0.05550713092088699f);
  p = p * f + Vec(0.24022120237350464f);
  p = p * f + Vec(0.6931469440460205f);
  p = p * f + Vec(1.0f);
  const FloatLanes power = (FloatLanes)((IntLanes)shifted.v << 23);
  return p.v * power;
#endif
}

// log2 x for normal x > 0, relative error of log2 below 1e-7 also beside 1. Minimax fit of log2(1 + f) / f.
FASTKD_FN Vec log2(Vec x) {
  const IntLanes bits = (IntLanes)x.v;
  const IntLanes exponent = (bits - 0x3f3504f3) >> 23;  // mantissa into [sqrt(1/2), sqrt(2))
  const Vec f = Vec((FloatLanes)(bits - (exponent << 23))) - Vec(1.0f);
  Vec p = Vec(0.1258370578289032f) * f + Vec(-0.2072697877883911f);
  p = p * f + Vec(0.21571560204029083f);
  p = p * f + Vec(-0.23894481360912323f);
  p = p * f + Vec(0.28791624307632446f);
  p = p * f + Vec(-0.3607036769390106f);
  p = p * f + Vec(0.48091062903404236f);
  p = p * f + Vec(-0.7213473320007324f);
  p = p * f + Vec(1.4426950216293335f);
  return p * f + Vec(__builtin_convertvector(exponent, FloatLanes));
}

FASTKD_FN float sum_lanes(Vec x) {
  float lane[kLanes];
  x.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

FASTKD_FN float max_lanes(Vec x) {
  float lane[kLanes];
  x.store(lane);
  float largest = lane[0];
  for (int i = 1; i < kLanes; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

}  // namespace
}  // namespace fastkd
