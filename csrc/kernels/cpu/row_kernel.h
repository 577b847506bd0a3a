// One row from logits to loss and gradient. A row is a list of blocks; each step works on a range of blocks, so that
// one thread may do the whole row or several share it, with the same bits.
#pragma once

#include "convert.h"
#include "isa.h"
#include "sweeps.h"

namespace fastkd {
namespace {

// A row under way. The scratch arrays hold whole padded rows.
struct RowJob {
  const LossParams& params;
  int64_t n;
  RowOptions options;
  const char *student, *teacher;
  char* gradient;  // null: the value alone
  Hard hard;
  float slope;  // log2(e) / T
  RowScratch scratch;
  Piece row;
  TermSums terms;
  GradientCoefficients coefficients;

  RowJob(const LossParams& p, int64_t row_index, const RowScratch& s)
      : params(p),
        n(row_index),
        options(p.options),
        student(p.student.row(n)),
        teacher(p.teacher.row(n)),
        gradient(p.gradient.data ? p.gradient.row(n) : nullptr),
        scratch(s) {
    if (p.temperatures) options.temperature = p.temperatures[n];
    hard = hard_source(options.temperature, p.needs_hard());
    slope = kLog2e / options.temperature;
  }

  int columns_of(int64_t block) const {
    const int64_t left = params.columns - block * kBlock;
    return left < kBlock ? static_cast<int>(left) : kBlock;
  }
  const char* student_at(int64_t block) const { return student + block * kBlock * size_of(params.student.dtype); }
  const char* teacher_at(int64_t block) const { return teacher + block * kBlock * size_of(params.teacher.dtype); }
  BlockView view(int64_t block, Block s, Block t) const {
    const int64_t at = block * kBlock;
    return {s.logits, t.logits, padded(columns_of(block)), scratch.exp_s + at, scratch.exp_t + at, scratch.exp_hard + at};
  }
  Exponent exponent(float reference) const { return {slope, finite_reference(reference)}; }
};

void first_step(RowJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  for (int64_t block = begin; block < end; ++block) {
    const int columns = job.columns_of(block);
    float* exp_s = job.scratch.exp_s + block * kBlock;
    float* exp_t = job.scratch.exp_t + block * kBlock;
    const Block s = read_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, exp_s);
    const Block t = read_block(job.teacher_at(block), p.teacher.dtype, columns, p.teacher_softcap, exp_t);
    const BlockView view = job.view(block, s, t);

    Piece& piece = job.scratch.pieces[block];
    piece = Piece{};
    piece.columns = static_cast<float>(columns);
    piece.reference_s = s.largest * job.slope;
    piece.reference_t = t.largest * job.slope;
    const VecExponent exponent_s(job.exponent(piece.reference_s)), exponent_t(job.exponent(piece.reference_t));
    if (job.options.label_smoothing != 0) piece.linear_s = linear_sum(s.logits, columns, exponent_s);
    if (p.stats) {
      piece.entropy_s = entropy_sum(s.logits, view.n, exponent_s);
      piece.entropy_t = entropy_sum(t.logits, view.n, exponent_t);
      piece.top_s = find_top(s.logits, columns, s.largest, block * kBlock);
      piece.top_t = find_top(t.logits, columns, t.largest, block * kBlock);
    }
    first_sweep_of(job.options.divergence, job.hard, view, exponent_s, exponent_t, job.options.temperature, piece);
  }
}

void merge_first_step(RowJob& job) {
  job.row = job.scratch.pieces[0];
  for (int64_t block = 1; block < blocks_of(job.params.columns); ++block)
    job.row.merge(job.scratch.pieces[block], job.options.temperature);
}

FASTKD_FN RowScales block_scales(const RowJob& job, const Piece& piece) {
  const float shift_s = piece.reference_s - finite_reference(job.row.reference_s);
  const float shift_t = piece.reference_t - finite_reference(job.row.reference_t);
  return {exp2(shift_s), exp2(shift_t), exp2(job.options.temperature * shift_s), 0};
}

void second_step(RowJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  const Denominators z(job.row);
  const VecExponent exponent_s(job.exponent(job.row.reference_s)), exponent_t(job.exponent(job.row.reference_t));
  float buffer_s[kBlock], buffer_t[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int columns = job.columns_of(block);
    const Block s = read_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, buffer_s);
    const Block t = read_block(job.teacher_at(block), p.teacher.dtype, columns, p.teacher_softcap, buffer_t);
    RowScales scales = block_scales(job, job.scratch.pieces[block]);
    scales.student /= job.row.sum_s;
    scales.teacher /= job.row.sum_t;
    scales.log2_ratio = z.log2_s - z.log2_t;
    job.scratch.terms[block] = term_sweep_of(job.options.divergence, job.view(block, s, t), exponent_s, exponent_t,
                                             scales, job.options.beta);
  }
}

// Merges the terms; afterwards job.terms holds the row's divergence and sum of dlogq.
void merge_second_step(RowJob& job) {
  if (has_one_sweep_value(job.options.divergence)) {
    job.terms = one_sweep_terms(job.options, job.row, Denominators(job.row));
    return;
  }
  job.terms = TermSums{};
  for (int64_t block = 0; block < blocks_of(job.params.columns); ++block) job.terms.merge(job.scratch.terms[block]);
}

void write_stats(const RowJob& job, const Denominators& z, float ce) {
  const Piece& row = job.row;
  const int64_t rows = job.params.rows;
  float* out = job.params.stats + job.n;
  out[0] = job.terms.value;
  out[rows] = ce;
  out[2 * rows] = entropy_of(row.entropy_s, row.sum_s, z.log2_s);
  out[3 * rows] = entropy_of(row.entropy_t, row.sum_t, z.log2_t);
  out[4 * rows] = row.top_s.column == row.top_t.column ? 1.0f : 0.0f;
}

// The row's loss, statistics and gradient coefficients.
void finish_row(RowJob& job) {
  const LossParams& p = job.params;
  const RowOptions& o = job.options;
  const Denominators z(job.row);
  float loss = o.kd_weight * (o.scale_by_t2 ? o.temperature * o.temperature : 1.0f) * job.terms.value;
  float ce = 0;
  if (p.needs_hard()) {
    const float label_logit = read_column(job.student, p.student.dtype, p.labels[job.n], p.student_softcap);
    ce = cross_entropy_of(o, job.row, z, job.exponent(job.row.reference_s)(label_logit));
    if (o.ce_weight != 0) loss += o.ce_weight * ce;
  }
  p.row_loss[job.n] = p.weight(job.n) * loss;
  if (p.stats) write_stats(job, z, ce);
  const float scale = p.weight(job.n) * p.gradient_scale;
  job.coefficients = gradient_coefficients(o, job.row, z, job.terms.dlogq, scale, p.needs_hard() && o.ce_weight != 0);
}

void last_step(RowJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  const bool forward_kl = job.options.divergence == Divergence::forward_kl;
  const int64_t label = p.needs_hard() ? p.labels[job.n] : -1;
  const Hard hard = job.options.ce_weight != 0 ? job.hard : Hard::none;
  float gradient[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int columns = job.columns_of(block);
    const RowScales scales = block_scales(job, job.scratch.pieces[block]);
    const GradientCoefficients& c = job.coefficients;
    // forward_kl: dlogq = -p, and p is the stored exponential times its scale
    const float dlogq = forward_kl ? -c.dlogq * scales.teacher / job.row.sum_t : c.dlogq;
    const BlockCoefficients block_c{c.student * scales.student, dlogq, c.hard * scales.hard, c.constant};
    BlockView view = job.view(block, {}, {});
    gradient_sweep_of(hard, view, block_c, gradient);
    const int64_t label_at = label - block * kBlock;
    if (label_at >= 0 && label_at < columns) gradient[label_at] += c.label;
    if (p.student_softcap != 0) {
      float capped[kBlock];
      load_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, capped);
      apply_softcap_gradient(capped, view.n, p.student_softcap, gradient);
    }
    store_block(gradient, columns, p.gradient.dtype, job.gradient + block * kBlock * size_of(p.gradient.dtype));
  }
}

// Gradient columns beyond the shared vocabulary, or all of an ignored row.
void zero_gradient(const LossParams& p, int64_t n, int64_t first_column) {
  if (!p.gradient.data) return;
  const int64_t size = size_of(p.gradient.dtype);
  std::memset(p.gradient.row(n) + first_column * size, 0,
              static_cast<size_t>((p.gradient_columns - first_column) * size));
}

void ignore_row(const LossParams& p, int64_t n) {
  p.row_loss[n] = 0;
  if (p.stats)
    for (int i = 0; i < 5; ++i) p.stats[i * p.rows + n] = 0;
  zero_gradient(p, n, 0);
}

}  // namespace
}  // namespace fastkd
