// The arithmetic of one row outside its sweeps: from the merged sums to the loss, and to the few coefficients that turn
// stored exponentials into the gradient (DESIGN section 1). Scalar, shared by every kernel.
#pragma once

#include "accumulators.h"
#include "divergence.h"

namespace fastkd {

// What the row is asked for.
struct RowOptions {
  Divergence divergence = Divergence::forward_kl;
  float beta = 0.5f, beta_rest = 0.5f;  // beta and 1 - beta, each rounded once
  float temperature = 1;
  bool scale_by_t2 = true;
  float kd_weight = 1, ce_weight = 0, label_smoothing = 0, z_loss = 0;
};

// log2 of the softmax denominators, relative to the row's largest logits.
struct Denominators {
  float log2_s, log2_t, log2_hard;

  FASTKD_METHOD explicit Denominators(const Piece& row)
      : log2_s(log2_of_row(row.sum_s)), log2_t(log2_of_row(row.sum_t)), log2_hard(log2_of_row(row.sum_hard)) {}
};

// ln sum exp of the student's logits at T = 1.
FASTKD_FN float hard_lse(const Piece& row, const Denominators& z) { return kLn2 * z.log2_hard + row.largest_s; }

// The weight w of KL(p||q) in a mixed divergence w KL(p||q) + (1 - w) KL(q||p).
FASTKD_FN float forward_share(const RowOptions& o) {
  return o.divergence == Divergence::forward_kl ? 1.0f : o.divergence == Divergence::reverse_kl ? 0.0f : o.beta;
}
FASTKD_FN float reverse_share(const RowOptions& o) {
  return o.divergence == Divergence::forward_kl ? 0.0f : o.divergence == Divergence::reverse_kl ? 1.0f : o.beta_rest;
}

// KL(teacher || student) and KL(student || teacher) in nats, from the first sweep alone.
FASTKD_FN float forward_kl_of(const Piece& row, const Denominators& z) {
  return kLn2 * (row.dot_t / row.sum_t - (z.log2_t - z.log2_s));
}
FASTKD_FN float reverse_kl_of(const Piece& row, const Denominators& z) {
  return kLn2 * (row.dot_s / row.sum_s - (z.log2_s - z.log2_t));
}

// A mixed divergence. A direction of weight 0 is left out: it may be infinite.
FASTKD_FN float mixed_kl_of(const RowOptions& o, const Piece& row, const Denominators& z) {
  const float forward = forward_share(o), reverse = reverse_share(o);
  return (forward == 0 ? 0.0f : forward * forward_kl_of(row, z)) +
         (reverse == 0 ? 0.0f : reverse * reverse_kl_of(row, z));
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
    const float lse = hard_lse(row, z);
    ce += o.z_loss * lse * lse;
  }
  return ce;
}

// The gradient of a column is
//   (student + ratio (y_t - y_s)) 2^y_s + teacher 2^y_t + dlogq dlogq_i + hard 2^(T y_s) + constant,
// and `label` more at the label's column; exponents relative to the row's largest logits, dlogq_i in units of ln 2.
struct GradientCoefficients {
  float student = 0, ratio = 0, teacher = 0, dlogq = 0, hard = 0, constant = 0, label = 0;
};

// 0, or NaN where a logit of the row is NaN or +inf: what is added to whatever might not carry it.
FASTKD_FN float zero_unless_nan(const Piece& row) { return 0.0f * (row.sum_s + row.sum_t); }

// The part of the cross-entropy. weight: the factor of the row's cross-entropy in the total.
FASTKD_FN void add_cross_entropy(GradientCoefficients& c, const RowOptions& o, const Piece& row, const Denominators& z,
                                 float weight) {
  c.hard = weight * (1.0f + 2.0f * o.z_loss * hard_lse(row, z)) / row.sum_hard;
  c.constant = -weight * o.label_smoothing / row.columns;
  c.label = -weight * (1.0f - o.label_smoothing);
}

// The part of the divergence. scale: the factor of the row's loss in the total, known before backward.
// Mixed divergences: d/ds_i of w KL(p||q) + (1 - w) KL(q||p) is (w (q - p) - (1 - w) q (lp - lq + KL(q||p))) / T.
// The others: (dlogq_i - q_i sum_j dlogq_j) / T.
FASTKD_FN GradientCoefficients divergence_coefficients(const RowOptions& o, const Piece& row, const Denominators& z,
                                                       const TermSums& terms, float scale) {
  GradientCoefficients c;
  if (o.kd_weight == 0) return c;  // left out: it may be infinite
  const float weight = scale * o.kd_weight * (o.scale_by_t2 ? o.temperature : 1.0f / o.temperature);
  if (!is_mixed_kl(o.divergence)) {
    c.dlogq = weight * kLn2;
    c.student = zero_unless_nan(row) - c.dlogq * terms.dlogq / row.sum_s;
    return c;
  }
  c.student = weight * forward_share(o) / row.sum_s;
  c.teacher = -weight * forward_share(o) / row.sum_t;
  if (reverse_share(o) == 0) return c;
  const float reverse = weight * reverse_share(o) / row.sum_s;
  c.ratio = -reverse * kLn2;
  c.student -= reverse * (reverse_kl_of(row, z) + kLn2 * (z.log2_s - z.log2_t));
  return c;
}

// -sum q log q in nats, from sum 2^y y and sum 2^y.
FASTKD_FN float entropy_of(float weighted, float sum, float log2_sum) { return kLn2 * (log2_sum - weighted / sum); }

}  // namespace fastkd
