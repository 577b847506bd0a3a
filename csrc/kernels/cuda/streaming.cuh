// Rows of any length: each sweep reads the logits from global memory. A row is cut into parts, a block each, whose sums
// meet in the next kernel: 5 N V with the gradient, 7 for a divergence whose terms need both softmax denominators
// first.
#pragma once

#include "resident.cuh"

namespace fastkd {
namespace gpu {

// f(chunk, place) for this thread's columns of the row. Two chunks of both models are under way while a third is
// computed: four loads of 16 bytes.
template <bool kReadOnly, class View, class F>
FASTKD_DEVICE void stream(const View& view, const Team& team, const F& f) {
  const int heads = team.heads(view.head), edges = heads + team.tails(view.tail());
  const int end = team.end(view.chunks);
  int base = team.begin(view.chunks), edge = 0;
  const auto next = [&](Chunk& chunk) {
    Place at{0, 0};
    if (edge < edges) {
      at = view.edge(edge++, heads);
    } else if (base < end) {
      at = view.place(base, end, team.lane);
      base += team.lanes;
    }
    if (at.n > 0) chunk = view.template load_place<kReadOnly>(at);
    return at;
  };
  Chunk now{}, then{}, later{};
  Place at_now = next(now), at_then = next(then);
#pragma unroll 1
  while (at_now.n > 0) {
    const Place at_later = next(later);
    f(now, at_now);
    now = then;
    then = later;
    at_now = at_then;
    at_then = at_later;
  }
}

FASTKD_DEVICE Team stream_team(const CudaLoss& call) {
  return {thread_index(), block_threads(), static_cast<int>(block_index() % call.splits), call.splits};
}

// The sums of a row's parts as one, in every lane of the first warp.
template <class Sums, class Merge>
FASTKD_DEVICE Sums merge_parts(const Sums* of_parts, int parts, int lane, const Merge& merge) {
  Sums sums{};
  for (int first = 0; first < parts; first += kWarp) {
    const Sums next = merge(first + lane < parts ? load(of_parts + first + lane) : Sums{});
    sums = first == 0 ? next : merge(lane == 0 ? sums : lane == 1 ? next : Sums{});
  }
  return sums;
}

template <class K>
FASTKD_KERNEL(kStreamThreads, 2)
stream_sums(FASTKD_CONSTANT CudaLoss call) {
  const LossParams& p = call.loss;
  const int64_t n = block_index() / call.splits;
  if (p.labels && load(p.labels + n) == p.ignore_index) return;
  const Team team = stream_team(call);
  const RowView view(p, call.access, n, team.lanes);
  const RowConstants r(p, n);
  const Sweep<K> sweep{view, r};
  if (team.part == 0 && team.lane == 0 && r.needs_hard) store(call.label_logits + n, label_logit_of<K>(view, r));
  Piece piece;
  stream<true>(view, team, [&](const Chunk& c, const Place& at) { sweep.sum(piece, c, at); });
  Piece* of_warps = reinterpret_cast<TeamScratch<false>*>(shared_memory())->warp_pieces;
  piece = merge_warps(piece, of_warps, [&](const Piece& x) { return merge_lanes<K>(x, r); });
  if (team.lane == 0) store(call.pieces + n * call.splits + team.part, piece);
}

template <class K>
FASTKD_KERNEL(kStreamThreads, 2)
stream_terms(FASTKD_CONSTANT CudaLoss call) {
  const LossParams& p = call.loss;
  const int64_t n = block_index() / call.splits;
  if (p.labels && load(p.labels + n) == p.ignore_index) return;
  const Team team = stream_team(call);
  const RowView view(p, call.access, n, team.lanes);
  const RowConstants r(p, n);
  const Sweep<K> sweep{view, r};
  auto* scratch = reinterpret_cast<TeamScratch<false>*>(shared_memory());
  RowState row{};
  if (team.lane < kWarp) {
    row = state_of<K>(merge_parts(call.pieces + n * call.sums_of_row, call.sums_of_row, team.lane,
                                  [&](const Piece& x) { return merge_lanes<K>(x, r); }));
  }
  row = broadcast<false>(row, &scratch->before_terms, team);
  TermSums terms;
  stream<true>(view, team, [&](const Chunk& c, const Place& at) { sweep.term(terms, c, at, row); });
  terms = merge_warps(terms, scratch->warp_terms, [](const TermSums& x) { return merge_lanes(x); });
  if (team.lane == 0) store(call.terms + n * call.splits + team.part, terms);
}

// Loss and gradient. A block a row suffices where there is no gradient.
template <class K>
FASTKD_KERNEL(kStreamThreads, 2)
stream_finish(FASTKD_CONSTANT CudaLoss call) {
  const LossParams& p = call.loss;
  const bool wants_gradient = p.gradient.data != nullptr;
  const int64_t n = wants_gradient ? block_index() / call.splits : block_index();
  const Team team = wants_gradient ? stream_team(call) : Team{thread_index(), block_threads(), 0, 1};
  if (p.labels && load(p.labels + n) == p.ignore_index) return ignore_row(p, n, team);
  const RowView view(p, call.access, n, team.lanes);
  const RowConstants r(p, n);
  const Sweep<K> sweep{view, r};
  RowState row{};
  if (team.lane < kWarp) {
    const Piece piece = merge_parts(call.pieces + n * call.sums_of_row, call.sums_of_row, team.lane,
                                    [&](const Piece& x) { return merge_lanes<K>(x, r); });
    TermSums terms;
    if (!K::kMixed) {
      terms = merge_parts(call.terms + n * call.sums_of_row, call.sums_of_row, team.lane,
                          [](const TermSums& x) { return merge_lanes(x); });
    }
    if (team.lane == 0) {
      row = state_of<K>(piece);
      const float label_logit = r.needs_hard ? load(call.label_logits + n) : 0;
      row.c = finish<K>(call, n, r, piece, terms, label_logit, team.part == 0);
      if (call.owned) row.c.label *= load(call.owned + n);
    }
  }
  if (!wants_gradient) return;
  row = broadcast<false>(row, &reinterpret_cast<TeamScratch<false>*>(shared_memory())->before_gradient, team);
  stream<false>(view, team, [&](const Chunk& c, const Place& at) { sweep.gradient(c, at, row); });
  zero_gradient(p, n, p.columns, team);
}

}  // namespace gpu
}  // namespace fastkd
