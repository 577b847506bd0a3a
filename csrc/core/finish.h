// From a row's merged sums to its loss, its statistics and the coefficients of its gradient.
#pragma once

#include "row.h"

namespace fastkd {

// What a row is worth beside its logits.
struct RowInputs {
  bool needs_hard = false;  // there are labels, and cross-entropy is in the loss or the statistics
  float label_logit = 0;    // the student's, after its softcap
  float token_weight = 1;
  float gradient_scale = 1;  // already in the stored gradient: 1 / denominator, or 1
  bool wants_gradient = true;
};

struct RowOutcome {
  float loss = 0;                                                                     // weighted, not divided
  float divergence = 0, cross_entropy = 0, student_entropy = 0, teacher_entropy = 0;  // nats
  float top1_agreement = 0;
  GradientCoefficients coefficients;
};

FASTKD_FN RowOutcome finish_row(const RowOptions& o, const Softening& softening, const Piece& row,
                                const TermSums& terms, const RowInputs& in) {
  const Denominators z(row);
  RowOutcome out;
  out.divergence = is_mixed_kl(o.divergence) ? mixed_kl_of(o, row, z) : kLn2 * terms.value + zero_unless_nan(row);
  if (o.kd_weight != 0) {  // a part of weight 0 is left out: it may be infinite
    out.loss = o.kd_weight * (o.scale_by_t2 ? o.temperature * o.temperature : 1.0f) * out.divergence;
  }
  if (in.needs_hard) {
    out.cross_entropy = cross_entropy_of(o, row, z, softening.relative_to(row.largest_s)(in.label_logit));
    if (o.ce_weight != 0) out.loss += o.ce_weight * out.cross_entropy;
  }
  out.loss *= in.token_weight;
  out.student_entropy = entropy_of(row.entropy_s, row.sum_s, z.log2_s);
  out.teacher_entropy = entropy_of(row.entropy_t, row.sum_t, z.log2_t);
  out.top1_agreement = row.top_s.column == row.top_t.column ? 1.0f : 0.0f;
  if (!in.wants_gradient) return out;
  const float scale = in.token_weight * in.gradient_scale;
  out.coefficients = divergence_coefficients(o, row, z, terms, scale);
  if (in.needs_hard && o.ce_weight != 0) add_cross_entropy(out.coefficients, o, row, z, scale * o.ce_weight);
  return out;
}

}  // namespace fastkd
