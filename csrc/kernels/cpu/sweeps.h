// The sweeps over one block of a row, which is small enough to stay in the first-level cache.
#pragma once

#include "../../core/accumulators.h"
#include "../../core/divergence.h"
#include "../../core/hard.h"
#include "../../core/softcap.h"
#include "isa.h"
#include "simd.h"

namespace fastkd {
namespace {

// Memory that the next block will touch, fetched a lane group at a time while this block is computed: rows come from
// far away, and the hardware's own prefetcher stops at every 4 KiB page.
struct Stream {
  const char* next = nullptr;
  int bytes = 0;  // per lane group

  FASTKD_METHOD void fetch(int i) const { __builtin_prefetch(next + i / kLanes * bytes); }
};

// One block of both rows. n is padded to whole lane groups; the arrays of exponentials are written, and may be the
// memory of the logits.
struct BlockView {
  const float* student;
  const float* teacher;
  int n;
  float *exp_s, *exp_t;           // 2^y; exp_t is replaced by dlogq in the second sweep
  float* ratio;                   // y_t - y_s
  float* exp_hard;                // 2^(T y_s)
  Stream next_s, next_t, next_d;  // what the next block reads and writes in memory

  template <int kColumns>
  FASTKD_METHOD void keep_in(float (&arrays)[4][kColumns]) {
    exp_s = arrays[0];
    exp_t = arrays[1];
    ratio = arrays[2];
    exp_hard = arrays[3];
  }
};

// First sweep: exponentials of both models and the sums of them that a divergence needs.
template <bool kDotTeacher, bool kDotStudent, bool kRatio, Hard kHard>
void first_sweep(const BlockView& b, Exponent<Vec> exponent_s, Exponent<Vec> exponent_t, float temperature,
                 Piece& piece) {
  Vec sum_s(0.0f), sum_t(0.0f), sum_hard(0.0f), dot_t(0.0f), dot_s(0.0f);
  const Vec t(temperature), zero(0.0f);
  const int power = static_cast<int>(temperature);
  for (int i = 0; i < b.n; i += kLanes) {
    b.next_s.fetch(i);
    b.next_t.fetch(i);
    __builtin_prefetch(b.exp_s + i + kBlock, 1);  // the next block's exponentials, about to be written
    __builtin_prefetch(b.exp_t + i + kBlock, 1);
    const Vec y_s = exponent_s(Vec::load(b.student + i)), y_t = exponent_t(Vec::load(b.teacher + i));
    const Vec e_s = exp2(y_s), e_t = exp2(y_t), ratio = y_t - y_s;
    sum_s += e_s;
    sum_t += e_t;
    if constexpr (kDotTeacher) dot_t += weigh(e_t, ratio);
    if constexpr (kDotStudent) dot_s += weigh(e_s, zero - ratio);
    if constexpr (kRatio) ratio.store(b.ratio + i);
    if constexpr (kHard == Hard::square) sum_hard += e_s * e_s;
    if constexpr (kHard == Hard::power || kHard == Hard::own) {
      Vec hard = e_s;
      if constexpr (kHard == Hard::own) {
        hard = exp2(t * y_s);
      } else {
        for (int k = 1; k < power; ++k) hard = hard * e_s;
      }
      hard.store(b.exp_hard + i);
      sum_hard += hard;
    }
    e_s.store(b.exp_s + i);
    e_t.store(b.exp_t + i);
  }
  piece.sum_s = sum_lanes(sum_s);
  piece.sum_t = sum_lanes(sum_t);
  piece.sum_hard = kHard == Hard::none ? piece.sum_s : sum_lanes(sum_hard);
  piece.dot_t = sum_lanes(dot_t);
  piece.dot_s = sum_lanes(dot_s);
}

template <bool kDotTeacher, bool kDotStudent, bool kRatio>
FASTKD_FN void first_sweep_hard(Hard hard, const BlockView& b, Exponent<Vec> s, Exponent<Vec> t, float temperature,
                                Piece& piece) {
  switch (hard) {
    case Hard::none: return first_sweep<kDotTeacher, kDotStudent, kRatio, Hard::none>(b, s, t, temperature, piece);
    case Hard::square: return first_sweep<kDotTeacher, kDotStudent, kRatio, Hard::square>(b, s, t, temperature, piece);
    case Hard::power: return first_sweep<kDotTeacher, kDotStudent, kRatio, Hard::power>(b, s, t, temperature, piece);
    case Hard::own: return first_sweep<kDotTeacher, kDotStudent, kRatio, Hard::own>(b, s, t, temperature, piece);
  }
}

FASTKD_FN void first_sweep_of(Divergence d, Hard hard, const BlockView& b, Exponent<Vec> s, Exponent<Vec> t,
                              float temperature, Piece& piece) {
  switch (d) {
    case Divergence::forward_kl: return first_sweep_hard<true, false, false>(hard, b, s, t, temperature, piece);
    case Divergence::reverse_kl: return first_sweep_hard<false, true, true>(hard, b, s, t, temperature, piece);
    case Divergence::symmetric_kl: return first_sweep_hard<true, true, true>(hard, b, s, t, temperature, piece);
    default: return first_sweep_hard<false, false, true>(hard, b, s, t, temperature, piece);
  }
}

// sum of y over the first n columns (not padded), for label smoothing.
float linear_sum(const float* logits, int n, Exponent<Vec> exponent) {
  // All of one sign: several sums, so that none grows far above what is added to it.
  constexpr int kSums = 4;
  Vec sum[kSums] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sum[i / kLanes % kSums] += exponent(Vec::load(logits + i));
  float y[kLanes];
  float rest = 0;
  if (i < n) exponent(Vec::load(logits + i)).store(y);
  for (int j = i; j < n; ++j) rest += y[j - i];
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// sum of 2^y y over n (padded) columns, for the entropy.
float entropy_sum(const float* logits, int n, Exponent<Vec> exponent) {
  Vec sum(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vec y = exponent(Vec::load(logits + i));
    sum += weigh(exp2(y), y);
  }
  return sum_lanes(sum);
}

FASTKD_FN Top find_top(const float* logits, int n, float largest, int64_t first_column) {
  for (int i = 0; i < n; ++i)
    if (logits[i] == largest) return {largest, first_column + i};
  return {};
}

// From a block's references to the row's: factors of its exponentials, and what its ratios are short of log2(p / q).
struct BlockScales {
  float student, teacher, hard, log2_ratio;
};

// Second sweep: dlogq of every column replaces the teacher's exponential; returns the sums of term and dlogq.
// scales: over the row's denominators, so that the exponentials become probabilities.
template <Divergence kDivergence>
TermSums term_sweep(const BlockView& b, const BlockScales& scales, float beta, float rest) {
  const Vec scale_s(scales.student), scale_t(scales.teacher), log2_ratio(scales.log2_ratio);
  Vec value(0.0f), dlogq(0.0f);
  for (int i = 0; i < b.n; i += kLanes) {
    const auto column = Column<Vec>::of_probabilities(
        scale_t * Vec::load(b.exp_t + i), scale_s * Vec::load(b.exp_s + i), log2_ratio + Vec::load(b.ratio + i));
    const Term<Vec> term = DivergenceTerm<kDivergence>::at(column, beta, rest);
    value += term.value;
    dlogq += term.dlogq;
    term.dlogq.store(b.exp_t + i);
  }
  return {sum_lanes(value), sum_lanes(dlogq)};
}

FASTKD_FN TermSums term_sweep_of(Divergence d, const BlockView& b, const BlockScales& scales, float beta, float rest) {
  switch (d) {
    case Divergence::jsd: return term_sweep<Divergence::jsd>(b, scales, beta, rest);
    case Divergence::total_variation: return term_sweep<Divergence::total_variation>(b, scales, beta, rest);
    case Divergence::skew_forward_kl: return term_sweep<Divergence::skew_forward_kl>(b, scales, beta, rest);
    case Divergence::skew_reverse_kl: return term_sweep<Divergence::skew_reverse_kl>(b, scales, beta, rest);
    default: return {};  // mixed divergences have no second sweep
  }
}

// Coefficients of one block's stored numbers in the gradient.
struct BlockCoefficients {
  float student, ratio, second, hard, constant;  // second: of exp_t, which holds 2^y_t or dlogq
};

// Last sweep: the gradient of n (padded) columns in fp32.
template <bool kRatio, Hard kHard>
void gradient_sweep(const BlockView& b, const BlockCoefficients& c, float* gradient) {
  const Vec student(c.student), ratio(c.ratio), second(c.second), hard(c.hard), constant(c.constant);
  for (int i = 0; i < b.n; i += kLanes) {
    b.next_d.fetch(i);
    const Vec e_s = Vec::load(b.exp_s + i);
    Vec d = second * Vec::load(b.exp_t + i) + constant;
    Vec of_e_s = student;
    if constexpr (kHard == Hard::square) of_e_s = hard * e_s + of_e_s;
    if constexpr (kHard == Hard::power) d = hard * Vec::load(b.exp_hard + i) + d;
    if constexpr (kRatio) {
      d = weigh(e_s, ratio * Vec::load(b.ratio + i) + of_e_s) + d;
    } else {
      d = of_e_s * e_s + d;
    }
    d.store(gradient + i);
  }
}

template <bool kRatio>
FASTKD_FN void gradient_sweep_hard(Hard hard, const BlockView& b, BlockCoefficients c, float* gradient) {
  if (hard == Hard::square) return gradient_sweep<kRatio, Hard::square>(b, c, gradient);
  if (hard == Hard::power || hard == Hard::own) return gradient_sweep<kRatio, Hard::power>(b, c, gradient);
  c.student += c.hard;  // T = 1: one exponential serves both
  gradient_sweep<kRatio, Hard::none>(b, c, gradient);
}

FASTKD_FN void gradient_sweep_of(Hard hard, const BlockView& b, const BlockCoefficients& c, float* gradient) {
  if (c.ratio != 0) return gradient_sweep_hard<true>(hard, b, c, gradient);
  gradient_sweep_hard<false>(hard, b, c, gradient);
}

// Chain rule of the softcap.
FASTKD_FN void apply_softcap_gradient(const float* capped_logits, int n, float softcap, float* gradient) {
  const Vec inverse_cap(1.0f / softcap);
  for (int i = 0; i < n; i += kLanes) {
    const Vec slope = softcap_slope(Vec::load(capped_logits + i), inverse_cap);
    (slope * Vec::load(gradient + i)).store(gradient + i);
  }
}

}  // namespace
}  // namespace fastkd
