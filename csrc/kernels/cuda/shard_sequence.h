// What a step on the columns of one process enqueues.
#pragma once

#include "sequence.h"
#include "shard.cuh"

namespace fastkd {

struct ShardWorkspace {
  Space space;
  CallScales* scales;
  float *row_loss, *label_logits;
  Piece* pieces;
  TermSums* terms;

  ShardWorkspace(char* memory, const ShardCall& s, const Plan& plan) : space{memory} {
    const int64_t rows = s.params.rows, parts = rows * plan.splits;
    const bool gradient = s.step == ShardStep::gradient;
    scales = space.take<CallScales>(gradient ? 1 : 0);
    row_loss = space.take<float>(gradient ? rows : 0);  // written by the gradient's kernel, and known already
    label_logits = space.take<float>(s.step == ShardStep::terms ? 0 : rows);
    pieces = space.take<Piece>(s.step == ShardStep::sums ? parts : rows);
    terms = space.take<TermSums>(s.step == ShardStep::terms ? parts : gradient ? rows : 0);
  }
};

// What the sweep of a step is told.
inline CudaLoss shard_sweep(const ShardCall& s, const Plan& plan, const ShardWorkspace& space) {
  CudaCall c;
  c.params = s.params;
  CudaLoss call = loss_of(c, plan, space.row_loss, space.scales);
  call.pieces = space.pieces;
  call.terms = space.terms;
  call.label_logits = space.label_logits;
  if (s.step == ShardStep::sums) return call;
  call.sums_of_row = 1;
  call.vocabulary = s.vocabulary;
  call.owned = s.row(kOwned, 0);
  call.loss.token_weights = s.row(kScale, 0);  // of the row in the total, its weight among it
  return call;
}

template <class Launch>
const char* enqueue_shard(const ShardCall& s, void* workspace, const Plan& plan, const Launch& launch) {
  const int64_t rows = s.params.rows, blocks = rows * plan.splits;
  if (rows == 0) return nullptr;
  if (blocks > kMostBlocks) return kTooManyRows;
  const KernelTable kernels = kernels_for(s.params);
  if (s.step == ShardStep::terms && !kernels.terms) return "terms of a divergence that has none";
  const ShardWorkspace space(static_cast<char*>(workspace), s, plan);
  const CudaShard shard{s, plan.splits, space.scales, space.pieces, space.terms, space.label_logits};
  const CudaLoss call = shard_sweep(s, plan, space);
  const auto sweep = [&](KernelTable::Kernel kernel) {
    return launch(kernel, call, blocks, plan.threads, 1, plan.shared_bytes);
  };
  const auto spread = [&] {
    return launch(gpu::shard_spread, shard, (rows + kStreamThreads - 1) / kStreamThreads, kStreamThreads, 1, 0);
  };
  const char* error = s.step == ShardStep::sums ? sweep(kernels.sums) : spread();
  if (!error && s.step != ShardStep::sums) error = sweep(s.step == ShardStep::terms ? kernels.terms : kernels.finish);
  if (!error && s.step != ShardStep::gradient) error = launch(gpu::shard_gather, shard, rows, gpu::kWarp, 1, 0);
  return error;
}

}  // namespace fastkd
