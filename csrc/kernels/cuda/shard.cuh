// Columns of one process: the kernels of streaming.cuh sweep them; these carry sums between the sweeps and what is
// exchanged, (fields, N), see shard_params.h.
#pragma once

#include "streaming.cuh"

namespace fastkd {
namespace gpu {

using EverySum = Kind<Divergence::symmetric_kl, true>;  // what no sweep made stays 0

// The sums of a row's parts, or those of its terms, to the exchange: a warp a row.
FASTKD_KERNEL(kWarp, 16) shard_gather(FASTKD_CONSTANT CudaShard call) {
  const ShardCall& s = call.shard;
  const LossParams& p = s.params;
  const int64_t n = block_index();
  const int lane = thread_index();
  const bool sums = s.step == ShardStep::sums;
  if (p.labels && load(p.labels + n) == p.ignore_index) {
    if (lane < (sums ? kFields : 2)) store(s.at(lane, n), 0.0f);
    return;
  }
  const RowConstants r(p, n);
  if (sums) {
    Piece piece = merge_parts(call.pieces + n * call.splits, call.splits, lane,
                              [&](const Piece& x) { return merge_lanes<EverySum>(x, r); });
    // a reference may be short of the largest logit, by which processes find out whose top is the row's
    if (r.stats) piece.rebase(piece.top_s.logit, piece.top_t.logit, r.softening);
    const float label_logit = r.needs_hard ? load(call.label_logits + n) : 0;
    if (lane == 0) s.write_sums(n, piece, label_logit, [](float* to, float x) { store(to, x); });
    return;
  }
  const TermSums terms =
      merge_parts(call.terms + n * call.splits, call.splits, lane, [](const TermSums& x) { return merge_lanes(x); });
  if (lane == 0) store(s.at(0, n), kLn2 * terms.value);
  if (lane == 0) store(s.at(1, n), kLn2 * terms.dlogq);
}

// What all processes know of a row, as the sums of a row that has one part; a thread a row.
FASTKD_KERNEL(kStreamThreads, 2) shard_spread(FASTKD_CONSTANT CudaShard call) {
  const ShardCall& s = call.shard;
  const int64_t n = block_index() * block_threads() + thread_index();
  const auto read = [](const float* from) { return load(from); };
  if (n >= s.params.rows) return;
  store(call.pieces + n, s.whole_row(n, read));
  if (s.step != ShardStep::gradient) return;
  store(call.terms + n, s.whole_terms(n, read));
  store(call.label_logits + n, 0.0f);  // the loss is known
  if (n == 0) store(call.scales, CallScales{});
}

}  // namespace gpu
}  // namespace fastkd
