// One row of a shard: the steps of row_kernel.h, with the sums of the whole row from outside in place of its own.
// Exponentials are made again for each exchange's sequel; nothing of N x V is kept between.
#pragma once

#include "row_kernel.h"

namespace fastkd {
namespace {

FASTKD_FN float bits_of(int64_t column) {
  const int32_t narrow = static_cast<int32_t>(column);
  float bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

void write_sums(const ShardCall& call, const RowJob& job) {
  const Piece& p = job.row;
  const float numbers[kFields] = {p.largest_s,
                                  p.largest_t,
                                  p.sum_s,
                                  p.sum_t,
                                  p.dot_t,
                                  p.dot_s,
                                  p.sum_hard,
                                  job.label_logit,
                                  p.linear_s,
                                  p.entropy_s,
                                  p.entropy_t,
                                  bits_of(p.top_s.column + call.first_column),
                                  bits_of(p.top_t.column + call.first_column)};
  for (int field = 0; field < kFields; ++field) std::memcpy(&call.at(field, job.n), numbers + field, sizeof(float));
}

// The sums of the whole row.
Piece whole_row(const ShardCall& call, int64_t n) {
  Piece p;
  p.largest_s = call.row(kLargestS, n);
  p.largest_t = call.row(kLargestT, n);
  p.sum_s = call.row(kSumS, n);
  p.sum_t = call.row(kSumT, n);
  p.dot_t = call.row(kDotT, n);
  p.dot_s = call.row(kDotS, n);
  p.sum_hard = call.row(kSumHard, n);
  p.columns = static_cast<float>(call.vocabulary);
  return p;
}

GradientCoefficients whole_row_coefficients(const ShardCall& call, const RowJob& job) {
  const Denominators z(job.row);
  const float scale = call.row(kScale, job.n);
  const TermSums terms{0, call.row(kDlogq, job.n) * kLog2e};  // in units of ln 2
  GradientCoefficients c = divergence_coefficients(job.options, job.row, z, terms, scale);
  if (job.gradient_hard() != Hard::none || (call.params.needs_hard() && job.options.ce_weight != 0)) {
    add_cross_entropy(c, job.options, job.row, z, scale * job.options.ce_weight);
    c.label *= call.row(kOwned, job.n);
  }
  return c;
}

void ignore_shard_row(const ShardCall& call, int64_t n) {
  if (call.step == ShardStep::gradient) return zero_gradient(call.params, n, 0);
  for (int field = 0; field < (call.step == ShardStep::sums ? kFields : 2); ++field) call.at(field, n) = 0;
}

void run_shard_row(const ShardCall& call, int64_t n, const RowScratch& scratch, const Executor* executor) {
  const LossParams& p = call.params;
  if (p.ignored(n)) return ignore_shard_row(call, n);
  RowJob job(p, n, scratch);
  if (call.step == ShardStep::sums) job.keeps_exponentials = false;
  run_step(job, executor, first_step);
  if (call.step == ShardStep::sums) {
    merge_first_step(job);
    return write_sums(call, job);
  }
  job.row = whole_row(call, n);
  if (!is_mixed_kl(job.options.divergence)) {
    run_step(job, executor, second_step);
    merge_second_step(job);
  }
  if (call.step == ShardStep::terms) {
    call.at(0, n) = kLn2 * job.terms.value;
    call.at(1, n) = kLn2 * job.terms.dlogq;
    return;
  }
  job.coefficients = whole_row_coefficients(call, job);
  run_step(job, executor, last_step);
  zero_gradient(p, n, p.columns);
}

}  // namespace
}  // namespace fastkd
