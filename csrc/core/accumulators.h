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

// Sums over a piece, all relative to the piece's own references. y_s, y_t: exponents of student and teacher at T.
struct Piece {
  float reference_s = minus_infinity(), reference_t = minus_infinity();
  float sum_s = 0, sum_t = 0;          // sum of 2^y: the softmax denominators
  float sum_hard = 0;                  // sum of 2^(T y_s): the student's denominator at T = 1
  float dot_t = 0, dot_s = 0;          // sum of 2^y_t (y_t - y_s), and of 2^y_s (y_s - y_t)
  float linear_s = 0;                  // sum of y_s, for label smoothing
  float entropy_s = 0, entropy_t = 0;  // sum of 2^y y
  float columns = 0;
  Top top_s, top_t;

  // Restates the sums relative to larger or equal references.
  FASTKD_METHOD void rebase(float new_s, float new_t, float temperature) {
    const float shift_s = reference_s - finite_reference(new_s), shift_t = reference_t - finite_reference(new_t);
    const float scale_s = exp2(shift_s), scale_t = exp2(shift_t);
    // An empty sum has nothing to shift (and 0 * -inf would be NaN); a sum scaled to 0 stays 0 even if infinite.
    if (scale_t == 0) dot_t = 0;
    if (scale_s == 0) dot_s = 0;
    dot_t = scale_t * dot_t + (sum_t == 0 || scale_t == 0 ? 0.0f : scale_t * sum_t * (shift_t - shift_s));
    dot_s = scale_s * dot_s + (sum_s == 0 || scale_s == 0 ? 0.0f : scale_s * sum_s * (shift_s - shift_t));
    entropy_s = scale_s * entropy_s + (sum_s == 0 || scale_s == 0 ? 0.0f : scale_s * sum_s * shift_s);
    entropy_t = scale_t * entropy_t + (sum_t == 0 || scale_t == 0 ? 0.0f : scale_t * sum_t * shift_t);
    linear_s += columns == 0 ? 0.0f : columns * shift_s;
    sum_s *= scale_s;
    sum_t *= scale_t;
    sum_hard *= exp2(temperature * shift_s);
    reference_s = new_s;
    reference_t = new_t;
  }

  // `later` holds the columns that follow this piece's.
  FASTKD_METHOD void merge(Piece later, float temperature) {
    const float new_s = later.reference_s > reference_s ? later.reference_s : reference_s;
    const float new_t = later.reference_t > reference_t ? later.reference_t : reference_t;
    rebase(new_s, new_t, temperature);
    later.rebase(new_s, new_t, temperature);
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

// Sums over a piece of the divergences that need both softmax denominators first.
struct TermSums {
  float value = 0, dlogq = 0;

  FASTKD_METHOD void merge(const TermSums& later) {
    value += later.value;
    dlogq += later.dlogq;
  }
};

}  // namespace fastkd
