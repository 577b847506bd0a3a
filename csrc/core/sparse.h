// The arithmetic of one row whose teacher names K columns only (DESIGN section 1, "Sparse teachers"): the named columns
// one by one, all others as one outcome, the rest. Scalar, shared by every kernel.
#pragma once

#include "finish.h"

namespace fastkd {

enum class Tail {
  bucket,       // the rest is an outcome with the mass that the named columns leave
  renormalize,  // the teacher is 0 outside the named columns, whose probabilities are divided by their sum
  sampled,      // the named columns are draws with weights, the divergence an expectation over them
};

// A column that the teacher names. Its gradient replaces what the sweep makes of it.
struct NamedColumn {
  int64_t column = 0;
  float log2_p = 0;  // of the teacher
  float weight = 0;  // Tail::sampled: of the draws of this column
  float logit = 0;   // the student's, after its softcap
  float dlogq = 0;
  float gradient = 0;
};

// The teacher's side of a row beside its named columns.
struct SparseTail {
  Tail kind = Tail::bucket;
  float rest = 0;        // mass of the rest; 0 for the other two
  float resolution = 0;  // what is below cannot be told from 0: 1 - sum p is a difference of rounded numbers
};

// Sums of the student over a piece: those of exponentials over the columns of the rest, relative to the largest of
// them.
struct StudentPiece {
  float largest = minus_infinity();  // of the rest
  float peak = minus_infinity();     // of all columns
  float sum = 0;                     // sum of 2^y
  float sum_hard = 0;                // sum of 2^(T y)
  float entropy = 0;                 // sum of 2^y y
  float linear = 0;                  // sum of (logit - peak) over all columns, as exponents
  float columns = 0;                 // of all
  Top top;                           // of all columns

  FASTKD_METHOD void rebase(float new_largest, float new_peak, const Softening& softening) {
    const float shift = softening.shift(largest, new_largest), scale = exp2(shift);
    // an empty sum has nothing to shift, and what is scaled to 0 stays 0 even if infinite
    entropy = scale == 0 ? 0.0f : scale * (entropy + (sum == 0 ? 0.0f : sum * shift));
    linear += columns == 0 ? 0.0f : columns * softening.shift(peak, new_peak);
    sum *= scale;
    sum_hard *= exp2(softening.temperature * shift);
    largest = new_largest;
    peak = new_peak;
  }

  // `later` holds the columns that follow this piece's.
  FASTKD_METHOD void merge(StudentPiece later, const Softening& softening) {
    const float new_largest = max(later.largest, largest), new_peak = max(later.peak, peak);
    rebase(new_largest, new_peak, softening);
    later.rebase(new_largest, new_peak, softening);
    sum += later.sum;
    sum_hard += later.sum_hard;
    entropy += later.entropy;
    linear += later.linear;
    columns += later.columns;
    top.merge(later.top);
  }
};

// The student's whole row: Piece's own sums, relative to the row's peak, and the rest within it.
struct StudentRow {
  Piece all;
  float log2_sum, log2_rest;  // log2 of the softmax denominator, and of the probability of the rest
  float rest_shift;           // log2 of the factor from the rest's exponentials to the row's

  FASTKD_METHOD StudentRow(const Softening& softening, const StudentPiece& rest, const NamedColumn* named,
                           int64_t count) {
    const float t = softening.temperature;
    all.largest_s = rest.peak;
    all.linear_s = rest.linear;
    all.columns = rest.columns;
    rest_shift = softening.shift(rest.largest, rest.peak);
    // the named columns are added one after the other, K of them: in double
    double sum = rest.sum * exp2(rest_shift), sum_hard = rest.sum_hard * exp2(t * rest_shift);
    const Exponent<float> exponent = softening.relative_to(rest.peak);
    for (int64_t i = 0; i < count; ++i) {
      const float y = exponent(named[i].logit);
      sum += exp2(y);
      sum_hard += exp2(t * y);
    }
    all.sum_s = static_cast<float>(sum);
    all.sum_hard = static_cast<float>(sum_hard);
    log2_sum = log2_of_row(all.sum_s);
    log2_rest = log2_of_row(rest.sum) + rest_shift - log2_sum;
  }
};

// A mixed divergence's term of one outcome in units of ln 2. The reverse direction takes log2 p no lower than `lowest`.
FASTKD_FN Term<float> mixed_term(const RowOptions& o, float log2_p, float log2_q, float lowest) {
  const float forward = forward_share(o), reverse = reverse_share(o);
  Term<float> term{0, 0};
  if (forward != 0) {  // a direction of weight 0 is left out: it may be infinite
    const float p = exp2(log2_p);
    term = {forward * weigh(p, log2_p - log2_q), -forward * kLog2e * p};
  }
  if (reverse != 0) {
    const float q = exp2(log2_q), value = reverse * weigh(q, log2_q - max(lowest, log2_p));
    term.value += value;
    term.dlogq += value + reverse * kLog2e * q;
  }
  return term;
}

FASTKD_FN Term<float> outcome_term(const RowOptions& o, float log2_p, float log2_q, float lowest) {
  const auto column = [&] { return column_of_logs<true>(log2_p, log2_q); };
  switch (o.divergence) {
    case Divergence::jsd: return DivergenceTerm<Divergence::jsd>::at(column(), o.beta, o.beta_rest);
    case Divergence::total_variation:
      return DivergenceTerm<Divergence::total_variation>::at(column(), o.beta, o.beta_rest);
    case Divergence::skew_forward_kl:
      return DivergenceTerm<Divergence::skew_forward_kl>::at(column(), o.beta, o.beta_rest);
    case Divergence::skew_reverse_kl:
      return DivergenceTerm<Divergence::skew_reverse_kl>::at(column(), o.beta, o.beta_rest);
    default: return mixed_term(o, log2_p, log2_q, lowest);
  }
}

// Terms of the named columns, their dlogq stored in them, and of the rest.
struct SparseTerms {
  double value = 0, dlogq = 0;  // sums over the outcomes, in units of ln 2
  double teacher_entropy = 0;   // likewise
  float dlogq_rest = 0;
};

FASTKD_FN SparseTerms sparse_terms(const RowOptions& o, const Softening& softening, const StudentRow& student,
                                   const SparseTail& tail, NamedColumn* named, int64_t count) {
  SparseTerms terms;
  const Exponent<float> exponent = softening.relative_to(student.all.largest_s);
  for (int64_t i = 0; i < count; ++i) {
    NamedColumn& c = named[i];
    const bool sampled = tail.kind == Tail::sampled;
    const float log2_q = exponent(c.logit) - student.log2_sum;
    const Term<float> term = sampled ? Term<float>{weigh(c.weight, c.log2_p - log2_q), -kLog2e * c.weight}
                                     : outcome_term(o, c.log2_p, log2_q, minus_infinity());
    c.dlogq = term.dlogq;
    terms.value += term.value;
    terms.dlogq += term.dlogq;
    terms.teacher_entropy -= weigh(sampled ? c.weight : exp2(c.log2_p), c.log2_p);
  }
  if (tail.kind == Tail::sampled) return terms;
  const bool absent = student.log2_rest == minus_infinity() && !(tail.rest > tail.resolution);
  const float log2_p = absent ? minus_infinity() : log2_of_row(tail.rest);
  const float lowest = tail.kind == Tail::bucket ? log2_of_row(tail.resolution) : minus_infinity();
  const Term<float> rest = outcome_term(o, log2_p, student.log2_rest, lowest);
  terms.dlogq_rest = rest.dlogq;
  terms.value += rest.value;
  terms.dlogq += rest.dlogq;
  terms.teacher_entropy -= weigh(exp2(log2_p), log2_p);
  return terms;
}

// Coefficients of the rest's exponentials, relative to its largest logit, and the whole gradients of the named columns
// but what their label adds. weight: the factor of the row's divergence in the total over T; hard: of its
// cross-entropy.
FASTKD_FN GradientCoefficients sparse_gradient(const RowOptions& o, const Softening& softening,
                                               const StudentRow& student, const StudentPiece& rest,
                                               const SparseTerms& terms, NamedColumn* named, int64_t count,
                                               float weight, float hard) {
  GradientCoefficients c;
  if (hard != 0) add_cross_entropy(c, o, student.all, Denominators(student.all), hard);
  const float kd = weight * kLn2, spoilt = zero_unless_nan(student.all);
  const float of_q = kd == 0 ? 0.0f : spoilt - kd * static_cast<float>(terms.dlogq) / student.all.sum_s;
  const Exponent<float> exponent = softening.relative_to(student.all.largest_s);
  for (int64_t i = 0; i < count; ++i) {
    const float y = exponent(named[i].logit), own = kd == 0 ? 0.0f : kd * named[i].dlogq;
    const float of_hard = c.hard == 0 ? 0.0f : c.hard * exp2(o.temperature * y);
    named[i].gradient = own + of_q * exp2(y) + of_hard + c.constant;
  }
  c.hard *= exp2(o.temperature * student.rest_shift);
  c.student = of_q * exp2(student.rest_shift);
  if (kd != 0 && rest.sum > 0) c.student += kd * terms.dlogq_rest / rest.sum;
  return c;
}

// -sum q log q of the whole row in units of ln 2.
FASTKD_FN float student_entropy(const Softening& softening, const StudentRow& student, const StudentPiece& rest,
                                const NamedColumn* named, int64_t count) {
  const Exponent<float> exponent = softening.relative_to(student.all.largest_s);
  double sum = 0;
  if (rest.sum > 0) {
    sum = exp2(student.log2_rest) * (rest.entropy / rest.sum + student.rest_shift - student.log2_sum);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float log2_q = exponent(named[i].logit) - student.log2_sum;
    sum += weigh(exp2(log2_q), log2_q);
  }
  return zero_unless_nan(student.all) - static_cast<float>(sum);
}

// The most probable named column, the lowest one at a tie; -1 where there is none.
FASTKD_FN int64_t teacher_top(const NamedColumn* named, int64_t count) {
  Top top{minus_infinity(), -1};
  for (int64_t i = 0; i < count; ++i) top.merge({named[i].log2_p, named[i].column});
  return top.column;
}

// From a row's sums to its loss, statistics and gradient. with_stats: also the entropies and the agreement.
FASTKD_FN RowOutcome finish_sparse_row(const RowOptions& o, const Softening& softening, const StudentPiece& rest,
                                       const SparseTail& tail, NamedColumn* named, int64_t count, const RowInputs& in,
                                       bool with_stats) {
  const StudentRow student(softening, rest, named, count);
  const SparseTerms terms = sparse_terms(o, softening, student, tail, named, count);
  RowOutcome out;
  out.divergence = kLn2 * static_cast<float>(terms.value) + zero_unless_nan(student.all);
  if (o.kd_weight != 0) {  // a part of weight 0 is left out: it may be infinite
    out.loss = o.kd_weight * (o.scale_by_t2 ? o.temperature * o.temperature : 1.0f) * out.divergence;
  }
  if (in.needs_hard) {
    const float label_y = softening.relative_to(student.all.largest_s)(in.label_logit);
    out.cross_entropy = cross_entropy_of(o, student.all, Denominators(student.all), label_y);
    if (o.ce_weight != 0) out.loss += o.ce_weight * out.cross_entropy;
  }
  out.loss *= in.token_weight;
  if (with_stats) {
    out.student_entropy = kLn2 * student_entropy(softening, student, rest, named, count);
    out.teacher_entropy = kLn2 * static_cast<float>(terms.teacher_entropy);
    out.top1_agreement = rest.top.column == teacher_top(named, count) ? 1.0f : 0.0f;
  }
  if (!in.wants_gradient) return out;
  const float scale = in.token_weight * in.gradient_scale;
  const float weight = scale * o.kd_weight * (o.scale_by_t2 ? o.temperature : 1.0f / o.temperature);
  const float hard = in.needs_hard ? scale * o.ce_weight : 0.0f;
  out.coefficients = sparse_gradient(o, softening, student, rest, terms, named, count, weight, hard);
  return out;
}

}  // namespace fastkd
