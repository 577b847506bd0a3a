// One row of a shard: the steps of row_kernel.h, with the sums of the whole row from outside in place of its own.
// Exponentials are made again for each exchange's sequel; nothing of N x V is kept between.
#pragma once

#include "row_kernel.h"

namespace fastkd {
namespace {

void write_number(float* to, float number) { std::memcpy(to, &number, sizeof number); }  // its bits may be a column's
float read_number(const float* from) { return *from; }

GradientCoefficients whole_row_coefficients(const ShardCall& call, const RowJob& job) {
  const Denominators z(job.row);
  const float scale = *call.row(kScale, job.n);
  const TermSums terms = call.whole_terms(job.n, read_number);
  GradientCoefficients c = divergence_coefficients(job.options, job.row, z, terms, scale);
  if (job.gradient_hard() != Hard::none || (call.params.needs_hard() && job.options.ce_weight != 0)) {
    add_cross_entropy(c, job.options, job.row, z, scale * job.options.ce_weight);
    c.label *= *call.row(kOwned, job.n);
  }
  return c;
}

void ignore_shard_row(const ShardCall& call, int64_t n) {
  if (call.step == ShardStep::gradient) return zero_gradient(call.params, n, 0);
  for (int field = 0; field < (call.step == ShardStep::sums ? kFields : 2); ++field) *call.at(field, n) = 0;
}

void run_shard_row(const ShardCall& call, int64_t n, const RowScratch& scratch, const Executor* executor) {
  const LossParams& p = call.params;
  if (p.ignored(n)) return ignore_shard_row(call, n);
  RowJob job(p, n, scratch);
  if (call.step == ShardStep::sums) job.keeps_exponentials = false;
  run_step(job, executor, first_step);
  if (call.step == ShardStep::sums) {
    merge_first_step(job);
    return call.write_sums(n, job.row, job.label_logit, write_number);
  }
  job.row = call.whole_row(n, read_number);
  if (!is_mixed_kl(job.options.divergence)) {
    run_step(job, executor, second_step);
    merge_second_step(job);
  }
  if (call.step == ShardStep::terms) {
    *call.at(0, n) = kLn2 * job.terms.value;
    *call.at(1, n) = kLn2 * job.terms.dlogq;
    return;
  }
  job.coefficients = whole_row_coefficients(call, job);
  run_step(job, executor, last_step);
  zero_gradient(p, n, p.columns);
}

}  // namespace
}  // namespace fastkd
