// The functions of one instruction set. Included by one source file per set, which defines FASTKD_KERNELS and
// FASTKD_ISA_NAME; everything but the table has internal linkage.
#pragma once

#include "products.h"
#include "row_kernel.h"
#include "shard_row.h"
#include "sparse_row.h"

namespace fastkd {
namespace {

void run_rows(const LossParams& p, int64_t begin, int64_t end, const RowScratch& scratch) {
  const int64_t blocks = blocks_of(p.columns);
  for (int64_t n = begin; n < end; ++n) {
    if (p.ignored(n)) {
      ignore_row(p, n);
      continue;
    }
    RowJob job(p, n, scratch);
    first_step(job, 0, blocks);
    merge_first_step(job);
    if (!is_mixed_kl(p.options.divergence)) {
      second_step(job, 0, blocks);
      merge_second_step(job);
    }
    finish_job(job);
    if (!job.gradient) continue;
    last_step(job, 0, blocks);
    zero_gradient(p, n, p.columns);
  }
}

void run_shared_row(const LossParams& p, int64_t n, const RowScratch& scratch, const Executor& executor) {
  if (p.ignored(n)) return ignore_row(p, n);
  RowJob job(p, n, scratch);
  run_step(job, &executor, first_step);
  merge_first_step(job);
  if (!is_mixed_kl(p.options.divergence)) {
    run_step(job, &executor, second_step);
    merge_second_step(job);
  }
  finish_job(job);
  if (!job.gradient) return;
  run_step(job, &executor, last_step);
  zero_gradient(p, n, p.columns);
}

void run_rescale(const RescaleParams& p, int64_t begin, int64_t end) {
  float block[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const float factor = p.factor[n * p.factor_stride] * p.common;
    const bool in_place = p.source.row(n) == p.gradient.row(n);
    if (factor == 1 && in_place) continue;
    const int64_t size = size_of(p.gradient.dtype);
    for (int64_t first = 0; first < p.columns; first += kBlock) {
      const int columns = static_cast<int>(p.columns - first < kBlock ? p.columns - first : kBlock);
      load_block(p.source.row(n) + first * size, p.source.dtype, columns, 0, block);
      for (int i = 0; i < padded(columns); i += kLanes) (Vec(factor) * Vec::load(block + i)).store(block + i);
      store_block(block, columns, p.gradient.dtype, p.gradient.row(n) + first * size);
    }
  }
}

}  // namespace

const CpuKernels FASTKD_KERNELS = {FASTKD_ISA_NAME, kLanes,        run_rows, run_shared_row, run_rescale,
                                   run_sparse_row,  run_shard_row, run_add,  run_turn};

}  // namespace fastkd
