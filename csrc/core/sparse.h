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

// Sums of exponentials over named columns, K of them one after the other: in double.
struct NamedSums {
  double sum = 0, sum_hard = 0;

  FASTKD_METHOD void add(float y, float temperature) {
    sum += exp2(y);
    sum_hard += exp2(temperature * y);
  }
};

// The student's whole row: Piece's own sums, relative to the row's peak, and the rest within it.
struct StudentRow {
  Piece all;
  float log2_sum, log2_rest;  // log2 of the softmax denominator, and of the probability of the rest
  float rest_shift;           // log2 of the factor from the rest's exponentials to the row's

  // named: relative to the peak
  FASTKD_METHOD StudentRow(const Softening& softening, const StudentPiece& rest, const NamedSums& named) {
    all.largest_s = rest.peak;
    all.linear_s = rest.linear;
    all.columns = rest.columns;
    rest_shift = softening.shift(rest.largest, rest.peak);
    all.sum_s = static_cast<float>(rest.sum * exp2(rest_shift) + named.sum);
    all.sum_hard = static_cast<float>(rest.sum_hard * exp2(softening.temperature * rest_shift) + named.sum_hard);
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

// Sums over the outcomes.
struct SparseTerms {
  double value = 0, dlogq = 0;  // in units of ln 2
  double teacher_entropy = 0;   // likewise
  float dlogq_rest = 0;
};

// The term of a named column whose exponent relative to the row's peak is y. log2_sum: of the StudentRow.
FASTKD_FN Term<float> named_term(const RowOptions& o, float log2_sum, const SparseTail& tail, const NamedColumn& c,
                                 float y) {
  const float log2_q = y - log2_sum;
  if (tail.kind == Tail::sampled) return {weigh(c.weight, c.log2_p - log2_q), -kLog2e * c.weight};
  return outcome_term(o, c.log2_p, log2_q, minus_infinity());
}

FASTKD_FN void add_named(SparseTerms& terms, const Term<float>& term, const SparseTail& tail, const NamedColumn& c) {
  terms.value += term.value;
  terms.dlogq += term.dlogq;
  terms.teacher_entropy -= weigh(tail.kind == Tail::sampled ? c.weight : exp2(c.log2_p), c.log2_p);
}

// The rest as one outcome.
FASTKD_FN void add_rest(SparseTerms& terms, const RowOptions& o, const StudentRow& student, const SparseTail& tail) {
  if (tail.kind == Tail::sampled) return;
  const bool absent = student.log2_rest == minus_infinity() && !(tail.rest > tail.resolution);
  const float log2_p = absent ? minus_infinity() : log2_of_row(tail.rest);
  const float lowest = tail.kind == Tail::bucket ? log2_of_row(tail.resolution) : minus_infinity();
  const Term<float> rest = outcome_term(o, log2_p, student.log2_rest, lowest);
  terms.dlogq_rest = rest.dlogq;
  terms.value += rest.value;
  terms.dlogq += rest.dlogq;
  terms.teacher_entropy -= weigh(exp2(log2_p), log2_p);
}

// What a named column's gradient is made of, but for what its label adds; exponents relative to the row's peak.
struct NamedGradient {
  float own = 0, of_q = 0, hard = 0, constant = 0;  // factors of dlogq, 2^y, 2^(T y), 1

  FASTKD_METHOD float at(float y, float dlogq, float temperature) const {
    return (own == 0 ? 0.0f : own * dlogq) + of_q * exp2(y) + (hard == 0 ? 0.0f : hard * exp2(temperature * y)) +
           constant;
  }
};

struct SparseGradient {
  NamedGradient named;
  GradientCoefficients rest;  // of its exponentials, relative to its own largest logit
};

// weight: the factor of the row's divergence in the total over T; hard: of its cross-entropy.
FASTKD_FN SparseGradient sparse_gradient(const RowOptions& o, const Softening& softening, const StudentRow& student,
                                         const StudentPiece& rest, const SparseTerms& terms, float weight, float hard) {
  SparseGradient g;
  GradientCoefficients& c = g.rest;
  if (hard != 0) add_cross_entropy(c, o, student.all, Denominators(student.all), hard);
  const float kd = weight * kLn2;
  const float of_q =
      kd == 0 ? 0.0f : zero_unless_nan(student.all) - kd * static_cast<float>(terms.dlogq) / student.all.sum_s;
  g.named = {kd, of_q, c.hard, c.constant};
  c.hard *= exp2(softening.temperature * student.rest_shift);
  c.student = of_q * exp2(student.rest_shift);
  if (kd != 0 && rest.sum > 0) c.student += kd * terms.dlogq_rest / rest.sum;
  return g;
}

// Parts of -sum q log q of the row in units of ln 2: of a named column, and of the rest.
FASTKD_FN float named_entropy(float log2_sum, float y) {
  const float log2_q = y - log2_sum;
  return -weigh(exp2(log2_q), log2_q);
}
FASTKD_FN double rest_entropy(const StudentRow& student, const StudentPiece& rest) {
  if (!(rest.sum > 0)) return zero_unless_nan(student.all);
  const float log2_q = rest.entropy / rest.sum + student.rest_shift - student.log2_sum;
  return zero_unless_nan(student.all) - exp2(student.log2_rest) * log2_q;
}

// What the statistics need of the named columns.
struct NamedStatistics {
  double entropy = 0;                 // see named_entropy
  Top teacher{minus_infinity(), -1};  // the most probable one, the lowest at a tie; -1 where there is none
};

// From a row's sums to its loss, and to its statistics where they are asked for.
FASTKD_FN RowOutcome sparse_outcome(const RowOptions& o, const Softening& softening, const StudentPiece& rest,
                                    const StudentRow& student, const SparseTerms& terms, const RowInputs& in,
                                    const NamedStatistics& named, bool with_stats) {
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
  if (!with_stats) return out;
  out.student_entropy = kLn2 * static_cast<float>(rest_entropy(student, rest) + named.entropy);
  out.teacher_entropy = kLn2 * static_cast<float>(terms.teacher_entropy);
  out.top1_agreement = rest.top.column == named.teacher.column ? 1.0f : 0.0f;
  return out;
}

FASTKD_FN SparseGradient sparse_gradient_of(const RowOptions& o, const Softening& softening, const StudentRow& student,
                                            const StudentPiece& rest, const SparseTerms& terms, const RowInputs& in) {
  const float scale = in.token_weight * in.gradient_scale;
  const float weight = scale * o.kd_weight * (o.scale_by_t2 ? o.temperature : 1.0f / o.temperature);
  return sparse_gradient(o, softening, student, rest, terms, weight, in.needs_hard ? scale * o.ce_weight : 0.0f);
}

// A whole row whose named columns one thread walks; their gradients are stored in them.
FASTKD_FN RowOutcome finish_sparse_row(const RowOptions& o, const Softening& softening, const StudentPiece& rest,
                                       const SparseTail& tail, NamedColumn* named, int64_t count, const RowInputs& in,
                                       bool with_stats) {
  const Exponent<float> exponent = softening.relative_to(rest.peak);
  NamedSums sums;
  for (int64_t i = 0; i < count; ++i) sums.add(exponent(named[i].logit), softening.temperature);
  const StudentRow student(softening, rest, sums);
  SparseTerms terms;
  NamedStatistics statistics;
  for (int64_t i = 0; i < count; ++i) {
    NamedColumn& c = named[i];
    const float y = exponent(c.logit);
    const Term<float> term = named_term(o, student.log2_sum, tail, c, y);
    c.dlogq = term.dlogq;
    add_named(terms, term, tail, c);
    if (!with_stats) continue;
    statistics.entropy += named_entropy(student.log2_sum, y);
    statistics.teacher.merge({c.log2_p, c.column});
  }
  add_rest(terms, o, student, tail);
  RowOutcome out = sparse_outcome(o, softening, rest, student, terms, in, statistics, with_stats);
  if (!in.wants_gradient) return out;
  const SparseGradient gradient = sparse_gradient_of(o, softening, student, rest, terms, in);
  out.coefficients = gradient.rest;
  for (int64_t i = 0; i < count; ++i) {
    const float y = exponent(named[i].logit);
    named[i].gradient = gradient.named.at(y, named[i].dlogq, o.temperature);
  }
  return out;
}

// Another draw of a column that has some already: their weights add up, and so does what they add to the loss.
FASTKD_FN void add_draw(NamedColumn& c, float weight, float log2_p) {
  const float total = c.weight + weight;
  if (log2_p != c.log2_p && total > 0) c.log2_p = (c.weight * c.log2_p + weight * log2_p) / total;
  c.weight = total;
}

}  // namespace fastkd
