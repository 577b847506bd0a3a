// The sweeps over one block of a row, which is small enough to stay in the first-level cache.
#pragma once

#include "../../core/accumulators.h"
#include "../../core/divergence.h"
#include "../../core/hard.h"
#include "../../core/softcap.h"
#include "convert.h"
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

// 2^(T y_s), where it is not made from 2^y_s when it is used.
template <Hard kHard>
FASTKD_FN Vec hard_exponential(Vec e_s, Vec y_s, Vec temperature, int power) {
  if constexpr (kHard == Hard::own) return exp2(temperature * y_s);
  Vec hard = e_s;
  for (int k = 1; k < power; ++k) hard = hard * e_s;
  return hard;
}

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
      const Vec hard = hard_exponential<kHard>(e_s, y_s, t, power);
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

// A lane group's exponentials in the last sweep, as the first sweep left them in memory ...
struct KeptColumns {
  const BlockView& b;

  template <bool kRatio, Hard kHard>
  FASTKD_METHOD void at(int i, Vec& e_s, Vec& e_t, Vec& ratio, Vec& hard) const {
    e_s = Vec::load(b.exp_s + i);
    e_t = Vec::load(b.exp_t + i);
    if constexpr (kRatio) ratio = Vec::load(b.ratio + i);
    if constexpr (kHard == Hard::power || kHard == Hard::own) hard = Vec::load(b.exp_hard + i);
  }
};

// ... or made again from the logits, with the same bits.
template <DType kDType>
struct RemadeColumns {
  const char *student, *teacher;
  Exponent<Vec> exponent_s, exponent_t;
  Vec temperature;
  int power;

  template <bool kRatio, Hard kHard>
  FASTKD_METHOD void at(int i, Vec& e_s, Vec& e_t, Vec& ratio, Vec& hard) const {
    constexpr int size = static_cast<int>(size_of(kDType));
    const Vec y_s = exponent_s(load_lanes<kDType>(student + i * size));
    const Vec y_t = exponent_t(load_lanes<kDType>(teacher + i * size));
    e_s = exp2(y_s);
    e_t = exp2(y_t);
    if constexpr (kRatio) ratio = y_t - y_s;
    if constexpr (kHard == Hard::power || kHard == Hard::own) {
      hard = hard_exponential<kHard>(e_s, y_s, temperature, power);
    }
  }
};

// Last sweep: the gradient of n (padded) columns in fp32.
template <bool kRatio, Hard kHard, class Columns>
void gradient_sweep(const BlockView& b, const Columns& columns, const BlockCoefficients& c, float* gradient) {
  const Vec student(c.student), ratio_weight(c.ratio), second(c.second), hard_weight(c.hard), constant(c.constant);
  for (int i = 0; i < b.n; i += kLanes) {
    b.next_s.fetch(i);
    b.next_t.fetch(i);
    b.next_d.fetch(i);
    Vec e_s, e_t, ratio, hard;
    columns.template at<kRatio, kHard>(i, e_s, e_t, ratio, hard);
    Vec d = second * e_t + constant;
    Vec of_e_s = student;
    if constexpr (kHard == Hard::square) of_e_s = hard_weight * e_s + of_e_s;
    if constexpr (kHard == Hard::power || kHard == Hard::own) d = hard_weight * hard + d;
    if constexpr (kRatio) {
      d = weigh(e_s, ratio_weight * ratio + of_e_s) + d;
    } else {
      d = of_e_s * e_s + d;
    }
    d.store(gradient + i);
  }
}

template <bool kRatio, class Columns>
FASTKD_FN void gradient_sweep_hard(Hard hard, const BlockView& b, const Columns& columns, BlockCoefficients c,
                                   float* gradient) {
  switch (hard) {
    case Hard::square: return gradient_sweep<kRatio, Hard::square>(b, columns, c, gradient);
    case Hard::power: return gradient_sweep<kRatio, Hard::power>(b, columns, c, gradient);
    case Hard::own: return gradient_sweep<kRatio, Hard::own>(b, columns, c, gradient);
    case Hard::none: break;
  }
  c.student += c.hard;  // T = 1: one exponential serves both
  gradient_sweep<kRatio, Hard::none>(b, columns, c, gradient);
}

template <class Columns>
FASTKD_FN void gradient_sweep_of(Hard hard, const BlockView& b, const Columns& columns, const BlockCoefficients& c,
                                 float* gradient) {
  if (c.ratio != 0) return gradient_sweep_hard<true>(hard, b, columns, c, gradient);
  gradient_sweep_hard<false>(hard, b, columns, c, gradient);
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
