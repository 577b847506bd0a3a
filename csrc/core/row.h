// The arithmetic of one row outside its sweeps: from the merged sums to the loss, and to the few coefficients that turn
// stored exponentials into the gradient (DESIGN section 1). Scalar, shared by every kernel.
#pragma once

#include "accumulators.h"
#include "divergence.h"

namespace fastkd {

// What the row is asked for.
struct RowOptions {
  Divergence divergence = Divergence::forward_kl;
  float beta = 0.5f;
  float temperature = 1;
  bool scale_by_t2 = true;
  float kd_weight = 1, ce_weight = 0, label_smoothing = 0, z_loss = 0;
};

// forward_kl, reverse_kl and symmetric_kl have their value from the first sweep's dot products; the others need both
// softmax denominators before their terms can be summed.
FASTKD_FN bool has_one_sweep_value(Divergence d) {
  return d == Divergence::forward_kl || d == Divergence::reverse_kl || d == Divergence::symmetric_kl;
}

// log2 of the softmax denominators, relative to the row's references.
struct Denominators {
  float log2_s, log2_t, log2_hard;

  FASTKD_METHOD explicit Denominators(const Piece& row)
      : log2_s(log2(row.sum_s)), log2_t(log2(row.sum_t)), log2_hard(log2(row.sum_hard)) {}
};

// KL(teacher || student) and KL(student || teacher) in nats, from the first sweep alone.
FASTKD_FN float forward_kl_of(const Piece& row, const Denominators& z) {
  return kLn2 * (row.dot_t / row.sum_t - (z.log2_t - z.log2_s));
}
FASTKD_FN float reverse_kl_of(const Piece& row, const Denominators& z) {
  return kLn2 * (row.dot_s / row.sum_s - (z.log2_s - z.log2_t));
}

// The divergence of the row and sum_j dlogq_j.
FASTKD_FN TermSums one_sweep_terms(const RowOptions& o, const Piece& row, const Denominators& z) {
  if (o.divergence == Divergence::forward_kl) return {forward_kl_of(row, z), -1.0f};
  const float reverse = reverse_kl_of(row, z);
  if (o.divergence == Divergence::reverse_kl) return {reverse, 1.0f + reverse};
  const float share = 1.0f - o.beta;  // a direction of weight 0 is left out: it may be infinite
  const float forward_part = o.beta == 0 ? 0.0f : o.beta * forward_kl_of(row, z);
  const float reverse_part = share == 0 ? 0.0f : share * reverse;
  return {forward_part + reverse_part, share + reverse_part - o.beta};
}

// Cross-entropy at T = 1 with label smoothing and z-loss. label_y: exponent of the label's logit at T.
FASTKD_FN float cross_entropy_of(const RowOptions& o, const Piece& row, const Denominators& z, float label_y) {
  const float t = o.temperature;
  float ce = kLn2 * (z.log2_hard - t * label_y);
  if (o.label_smoothing != 0) {
    const float uniform = kLn2 * (z.log2_hard - t * row.linear_s / row.columns);
    ce = (1.0f - o.label_smoothing) * ce + o.label_smoothing * uniform;
  }
  if (o.z_loss != 0) {
    const float lse = kLn2 * (z.log2_hard + t * row.reference_s);
    ce += o.z_loss * lse * lse;
  }
  return ce;
}

// The gradient of a column is
//   student * 2^y_s + dlogq * dlogq_i + hard * 2^(T y_s) + constant, and `label` more at the label's column,
// with the exponentials relative to the row's references.
struct GradientCoefficients {
  float student = 0, dlogq = 0, hard = 0, constant = 0, label = 0;
};

// scale: the factor of the row's loss in the total, known before backward. has_hard: whether cross-entropy counts.
FASTKD_FN GradientCoefficients gradient_coefficients(const RowOptions& o, const Piece& row, const Denominators& z,
                                                     float dlogq_sum, float scale, bool has_hard) {
  GradientCoefficients c;
  const float t = o.temperature;
  c.dlogq = scale * o.kd_weight * (o.scale_by_t2 ? t : 1.0f / t);
  c.student = -c.dlogq * dlogq_sum / row.sum_s;
  if (!has_hard) return c;
  const float weight = scale * o.ce_weight;
  const float lse = kLn2 * (z.log2_hard + t * row.reference_s);
  c.hard = weight * (1.0f + 2.0f * o.z_loss * lse) / row.sum_hard;
  c.constant = -weight * o.label_smoothing / row.columns;
  c.label = -weight * (1.0f - o.label_smoothing);
  return c;
}

// -sum q log q in nats, from sum 2^y y and sum 2^y.
FASTKD_FN float entropy_of(float weighted, float sum, float log2_sum) { return kLn2 * (log2_sum - weighted / sum); }

}  // namespace fastkd
