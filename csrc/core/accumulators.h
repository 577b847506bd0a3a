// Running sums of a piece of a row, with an identity and a merge. Pieces merge in column order, so the bits of a row
// do not depend on who computed which piece.
#pragma once

#include <cstdint>

#include "numerics.h"

namespace fastkd {

// The place of the largest logit; the lowest column wins a tie.
struct Top {
  float logit = minus_infinity();
  int64_t column = 0;

  FASTKD_METHOD void merge(const Top& later) {
    if (later.logit > logit) *this = later;
  }
};

// What a row's exponents have in common.
struct Softening {
  float temperature = 1;
  float slope = kLog2e;  // log2(e) / T

  FASTKD_METHOD Exponent<float> relative_to(float reference) const { return {finite_reference(reference), slope}; }
  // log2 of the factor from sums relative to `from` to sums relative to `to`, which is at least as large
  FASTKD_METHOD float shift(float from, float to) const { return (from - finite_reference(to)) * slope; }
};

// Sums over a piece, all relative to the piece's own largest logits. y_s, y_t: exponents of student and teacher at T.
struct Piece {
  float largest_s = minus_infinity(), largest_t = minus_infinity();
  float sum_s = 0, sum_t = 0;          // sum of 2^y: the softmax denominators
  float sum_hard = 0;                  // sum of 2^(T y_s): the student's denominator at T = 1
  float dot_t = 0, dot_s = 0;          // sum of 2^y_t (y_t - y_s), and of 2^y_s (y_s - y_t)
  float linear_s = 0;                  // sum of y_s, for label smoothing
  float entropy_s = 0, entropy_t = 0;  // sum of 2^y y
  float columns = 0;
  Top top_s, top_t;

  // Restates the sums relative to larger or equal logits.
  FASTKD_METHOD void rebase(float new_s, float new_t, const Softening& softening) {
    const float shift_s = softening.shift(largest_s, new_s), shift_t = softening.shift(largest_t, new_t);
    const float scale_s = exp2(shift_s), scale_t = exp2(shift_t);
    // An empty sum has nothing to shift (and 0 * -inf would be NaN); what is scaled to 0 stays 0 even if infinite.
    dot_t = scale_t == 0 ? 0.0f : scale_t * (dot_t + (sum_t == 0 ? 0.0f : sum_t * (shift_t - shift_s)));
    dot_s = scale_s == 0 ? 0.0f : scale_s * (dot_s + (sum_s == 0 ? 0.0f : sum_s * (shift_s - shift_t)));
    entropy_s = scale_s == 0 ? 0.0f : scale_s * (entropy_s + (sum_s == 0 ? 0.0f : sum_s * shift_s));
    entropy_t = scale_t == 0 ? 0.0f : scale_t * (entropy_t + (sum_t == 0 ? 0.0f : sum_t * shift_t));
    linear_s += columns == 0 ? 0.0f : columns * shift_s;
    sum_s *= scale_s;
    sum_t *= scale_t;
    sum_hard *= exp2(softening.temperature * shift_s);
    largest_s = new_s;
    largest_t = new_t;
  }

  // `later` holds the columns that follow this piece's.
  FASTKD_METHOD void merge(Piece later, const Softening& softening) {
    const float new_s = max(later.largest_s, largest_s), new_t = max(later.largest_t, largest_t);
    rebase(new_s, new_t, softening);
    later.rebase(new_s, new_t, softening);
    sum_s += later.sum_s;
    sum_t += later.sum_t;
    sum_hard += later.sum_hard;
    dot_t += later.dot_t;
    dot_s += later.dot_s;
    linear_s += later.linear_s;
    entropy_s += later.entropy_s;
    entropy_t += later.entropy_t;
    columns += later.columns;
    top_s.merge(later.top_s);
    top_t.merge(later.top_t);
  }
};

// Sums of term and dlogq over a piece.
struct TermSums {
  float value = 0, dlogq = 0;

  FASTKD_METHOD void merge(const TermSums& later) {
    value += later.value;
    dlogq += later.dlogq;
  }
};

}  // namespace fastkd
