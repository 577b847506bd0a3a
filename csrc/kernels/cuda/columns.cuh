// The arithmetic of four columns at a time: sums of the first sweep, terms of the second, the gradient.
#pragma once

#include "../../core/divergence.h"
#include "../../core/hard.h"
#include "../../core/softcap.h"
#include "limits.h"
#include "view.cuh"

namespace fastkd {
namespace gpu {

// What a kernel is compiled for; the rest branches uniformly. reverse_kl runs as symmetric_kl.
// kRich: softcaps, label smoothing and statistics may be asked for.
template <Divergence kDivergenceOf, bool kRichOf>
struct Kind {
  static constexpr Divergence kDivergence = kDivergenceOf;
  static constexpr bool kRich = kRichOf;
  // The block of block_resident by which its registers are bounded; kResidentThreads at least. 768 threads leave 80
  // registers each, so that three blocks of 256 share a multiprocessor; without clusters there is one larger block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBoundingThreads = kRichOf ? 512 : 640;
#else
  static constexpr int kBoundingThreads = kRichOf ? 512 : 768;
#endif
  static_assert(kBoundingThreads >= kResidentThreads, "a block may have more threads than its registers allow");
  static constexpr bool kMixed = kDivergenceOf == Divergence::forward_kl || kDivergenceOf == Divergence::symmetric_kl;
  static constexpr bool kBothDots = kDivergenceOf == Divergence::symmetric_kl;
  // Where all sweeps together would ask the special-function unit for more than 7 results a column, which is what it
  // gives while a row is loaded, a part of the exponentials goes by the polynomial.
  static constexpr bool kTeacherByPolynomial = kDivergenceOf == Divergence::skew_reverse_kl;
};

// What a row is computed with, the same in all its threads.
struct RowConstants {
  RowOptions options;
  Softening softening;
  Hard hard;
  int power;    // T where hard is a power of the tempered exponential, 1 where it is that itself
  float slack;  // exponents may rise above their reference by this much before the sums are restated
  float student_softcap, teacher_softcap;
  bool needs_hard, smoothing, stats;
  int64_t label;       // -1: none
  float token_weight;  // NaN where the row's label or temperature is out of range: so are its loss and gradient

  FASTKD_DEVICE_METHOD RowConstants(const LossParams& p, int64_t n)
      : options(p.options),
        student_softcap(p.student_softcap),
        teacher_softcap(p.teacher_softcap),
        needs_hard(p.needs_hard()),
        smoothing(needs_hard && p.options.label_smoothing != 0),
        stats(p.stats != nullptr),
        label(-1),
        token_weight(p.token_weights ? load(p.token_weights + n) : 1.0f) {
    if (p.temperatures) options.temperature = load(p.temperatures + n);
    const float t = options.temperature;
    const bool good_temperature = t > 0 && t < -minus_infinity();
    softening = {t, kLog2e / t};
    hard = hard_source(t, needs_hard);
    power = hard == Hard::square || hard == Hard::power ? static_cast<int>(t) : 1;
    slack = t > 8 ? 48 / t : 6;  // 2^(T slack) times any number of columns is finite
    bool good_label = true;
    if (p.labels) {
      const int64_t y = load(p.labels + n);
      good_label = y >= 0 && y < p.columns;
      if (needs_hard && good_label) label = static_cast<int>(y);
    }
    if (!good_temperature || !good_label) token_weight = 0 * minus_infinity();
  }

  // Four capped logits; `cap` 0: as they are.
  template <class K>
  FASTKD_DEVICE_METHOD void cap(Quad& x, float cap) const {
    if (!K::kRich || cap == 0) return;
    const float inverse = 1 / cap;
    for (int i = 0; i < 4; ++i) x.value[i] = softcapped(x.value[i], cap, inverse);
  }
};

FASTKD_DEVICE float largest_of(const Quad& x) { return max(max(x.value[0], x.value[1]), max(x.value[2], x.value[3])); }

// 2^(T y) from e = 2^y, of four columns.
FASTKD_DEVICE Quad hard_exponentials(const RowConstants& r, const Quad& e, const Quad& y) {
  const float t = r.options.temperature;
  if (r.hard == Hard::own)
    return {{exp2(t * y.value[0]), exp2(t * y.value[1]), exp2(t * y.value[2]), exp2(t * y.value[3])}};
  Quad product = e;
#pragma unroll 1
  for (int k = 1; k < r.power; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product.value[i] *= e.value[i];
  }
  return product;
}

FASTKD_DEVICE void add_statistics(Piece& piece, const Quad& s, const Quad& t, const Quad& y_s, const Quad& y_t,
                                  const Quad& e_s, const Quad& e_t, int first, int stride) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    piece.entropy_s += weigh(e_s.value[i], y_s.value[i]);
    piece.entropy_t += weigh(e_t.value[i], y_t.value[i]);
    if (s.value[i] > piece.top_s.logit) piece.top_s = {s.value[i], first + i * stride};
    if (t.value[i] > piece.top_t.logit) piece.top_t = {t.value[i], first + i * stride};
  }
}

// First sweep. s, t: capped logits, the first n of them columns of the row, the rest masked.
template <class K>
FASTKD_DEVICE void add_columns(Piece& piece, const Quad& s, const Quad& t, int first, int stride, int n,
                               const RowConstants& r) {
  const float largest_s = largest_of(s), largest_t = largest_of(t), slope = r.softening.slope;
  if ((largest_s - piece.largest_s) * slope > r.slack || (largest_t - piece.largest_t) * slope > r.slack)
    piece.rebase(max(largest_s, piece.largest_s), max(largest_t, piece.largest_t), r.softening);
  const Exponent<float> exponent_s = r.softening.relative_to(piece.largest_s);
  const Exponent<float> exponent_t = r.softening.relative_to(piece.largest_t);
  Quad y_s, e_s, y_t, e_t;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y_s.value[i] = exponent_s(s.value[i]);
    y_t.value[i] = exponent_t(t.value[i]);
    e_s.value[i] = exp2(y_s.value[i]);
    e_t.value[i] = K::kTeacherByPolynomial ? exp2_by_polynomial(y_t.value[i]) : exp2(y_t.value[i]);
    piece.sum_s += e_s.value[i];
    piece.sum_t += e_t.value[i];
    if (K::kMixed) piece.dot_t += weigh(e_t.value[i], y_t.value[i] - y_s.value[i]);
    if (K::kBothDots) piece.dot_s += weigh(e_s.value[i], y_s.value[i] - y_t.value[i]);
    if (K::kRich && r.smoothing && i < n) piece.linear_s += y_s.value[i];
  }
  if (K::kRich) piece.columns += static_cast<float>(n);
  if (K::kRich && r.stats) add_statistics(piece, s, t, y_s, y_t, e_s, e_t, first, stride);
  if (r.hard == Hard::none) return;
  const Quad hard = hard_exponentials(r, e_s, y_s);
#pragma unroll
  for (int i = 0; i < 4; ++i) piece.sum_hard += hard.value[i];
}

// Logarithms of a column's probabilities, base 2.
struct Logs {
  float p, q;

  FASTKD_DEVICE_METHOD Logs(float s, float t, const RowState& row, const RowConstants& r)
      : p(r.softening.relative_to(row.largest_t)(t) - row.log2_t),
        q(r.softening.relative_to(row.largest_s)(s) - row.log2_s) {}
};

// Second sweep.
template <class K>
FASTKD_DEVICE void add_terms(TermSums& sums, const Quad& s, const Quad& t, const RowState& row, const RowConstants& r) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Logs logs(s.value[i], t.value[i], row, r);
    const Term<float> term = LogTerm<K::kDivergence>::term(logs.p, logs.q, r.options.beta, r.options.beta_rest);
    sums.value += term.value;
    sums.dlogq += term.dlogq;
  }
}

// The part of the cross-entropy in a gradient d of four columns, and the softcap's slope. s: capped logits.
template <class K>
FASTKD_DEVICE void add_hard_part(Quad& d, const Quad& s, const Quad& y_s, const Quad& e_s, int first, int stride,
                                 const GradientCoefficients& c, const RowConstants& r) {
  if (c.hard != 0) {
    const Quad hard = hard_exponentials(r, e_s, y_s);
#pragma unroll
    for (int i = 0; i < 4; ++i) d.value[i] += c.hard * hard.value[i];
  }
  const int at = r.label - first;  // a row without a label has none of this column
  if (at >= 0 && at <= 3 * stride) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at == i * stride) d.value[i] += c.label;
  }
  if (K::kRich && r.student_softcap != 0) {
    const float inverse = 1 / r.student_softcap;
    for (int i = 0; i < 4; ++i) d.value[i] *= softcap_slope(s.value[i], inverse);
  }
}

// Last sweep: d of four columns, see GradientCoefficients. c.hard is 0 where there is no cross-entropy.
template <class K>
FASTKD_DEVICE Quad gradient_of(const Quad& s, const Quad& t, int first, int stride, const RowState& row,
                               const RowConstants& r) {
  const GradientCoefficients& c = row.c;
  const Exponent<float> exponent_s = r.softening.relative_to(row.largest_s);
  const Exponent<float> exponent_t = r.softening.relative_to(row.largest_t);
  float student = 0, dlogq = 0;  // of a probability rather than an exponential
  if constexpr (!K::kMixed) {
    student = c.student * row.sum_s;
    dlogq = c.dlogq * LogTerm<K::kDivergence>::scale(r.options.beta_rest);
  }
  Quad d, y_s, e_s;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (K::kMixed) {
      y_s.value[i] = exponent_s(s.value[i]);
      const float y_t = exponent_t(t.value[i]);
      e_s.value[i] = exp2(y_s.value[i]);
      d.value[i] = c.teacher * exp2(y_t) + c.constant;
      if constexpr (K::kBothDots) {
        const float by_ratio = c.ratio == 0 ? 0.0f : c.ratio * (y_t - y_s.value[i]);
        d.value[i] += weigh(e_s.value[i], by_ratio + c.student);
      } else {
        d.value[i] += c.student * e_s.value[i];
      }
    } else {
      const Logs logs(s.value[i], t.value[i], row, r);
      const float slope = LogTerm<K::kDivergence>::slope(logs.p, logs.q, r.options.beta, r.options.beta_rest);
      e_s.value[i] = exp2(logs.q);
      d.value[i] = (dlogq * slope + student) * e_s.value[i] + c.constant;
    }
  }
  if constexpr (!K::kMixed) {
    if (c.hard != 0) {
      for (int i = 0; i < 4; ++i) {
        y_s.value[i] = exponent_s(s.value[i]);
        e_s.value[i] *= row.sum_s;
      }
    }
  }
  add_hard_part<K>(d, s, y_s, e_s, first, stride, c, r);
  return d;
}

}  // namespace gpu
}  // namespace fastkd
