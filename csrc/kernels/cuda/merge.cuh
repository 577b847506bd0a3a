// Sums of lanes, warps, blocks and parts become the row's. Always in the same order: the same bits run to run.
#pragma once

#include "columns.cuh"

namespace fastkd {
namespace gpu {

FASTKD_DEVICE void take_top(Top& top, const Top& other) {
  if (other.logit > top.logit || (other.logit == top.logit && other.column < top.column)) top = other;
}
// From the lane `lanes` away.
FASTKD_DEVICE void take_top(Top& top, int lanes) {
  take_top(top, Top{shuffle_xor(kAllLanes, top.logit, lanes), shuffle_xor(kAllLanes, top.column, lanes)});
}

// The pieces of a warp's lanes as one, in every lane.
template <class K>
FASTKD_DEVICE Piece merge_lanes(Piece p, const RowConstants& r) {
  float largest_s = p.largest_s, largest_t = p.largest_t;
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    largest_s = max(shuffle_xor(kAllLanes, largest_s, lanes), largest_s);
    largest_t = max(shuffle_xor(kAllLanes, largest_t, lanes), largest_t);
  }
  p.rebase(largest_s, largest_t, r.softening);
  const auto add = [](float& x, int lanes) { x += shuffle_xor(kAllLanes, x, lanes); };
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    add(p.sum_s, lanes);
    add(p.sum_t, lanes);
    add(p.sum_hard, lanes);
    if (K::kMixed) add(p.dot_t, lanes);
    if (K::kBothDots) add(p.dot_s, lanes);
    if (!K::kRich) continue;
    add(p.columns, lanes);
    add(p.linear_s, lanes);
    if (!r.stats) continue;
    add(p.entropy_s, lanes);
    add(p.entropy_t, lanes);
    take_top(p.top_s, lanes);
    take_top(p.top_t, lanes);
  }
  if (r.hard == Hard::none) p.sum_hard = p.sum_s;
  return p;
}

FASTKD_DEVICE TermSums merge_lanes(TermSums t) {
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    t.value += shuffle_xor(kAllLanes, t.value, lanes);
    t.dlogq += shuffle_xor(kAllLanes, t.dlogq, lanes);
  }
  return t;
}

// The sums of a block's warps as one, in every lane of its first warp; other warps get their own.
template <class Sums, class Merge>
FASTKD_DEVICE Sums merge_warps(Sums own, Sums* of_warps, const Merge& merge) {
  own = merge(own);
  const int warps = block_threads() / kWarp, warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  if (warps == 1) return own;
  if (lane == 0) shared_store(of_warps + warp, own);
  block_sync();
  if (warp != 0) return own;
  return merge(lane < warps ? shared_load(of_warps + lane) : Sums{});
}

// The sums of a cluster's blocks, each in its block's first warp, as one in every lane of every first warp.
template <class Sums, class Merge>
FASTKD_DEVICE Sums merge_cluster(Sums own, Sums* of_block, const Team& team, const Merge& merge) {
  if (team.parts == 1) return own;
  if (team.lane == 0) shared_store(of_block, own);
  cluster_sync();
  if (team.lane >= kWarp) return own;
  return merge(team.lane < team.parts ? peer_load(of_block, team.lane) : Sums{});
}

// What every thread of the team needs of the row, from its first lane.
template <bool kWarpTeam, class T>
FASTKD_DEVICE T broadcast(const T& value, T* shared, const Team& team) {
  if (team.lane == 0) shared_store(shared, value);
  if (kWarpTeam) {
    warp_sync(kAllLanes);
  } else {
    block_sync();
  }
  return shared_load(shared);
}

template <class K>
FASTKD_DEVICE RowState state_of(const Piece& row) {
  RowState state{row.largest_s, row.largest_t, 0, 0, row.sum_s, {}};
  if (!K::kMixed) {
    const Denominators z(row);
    state.log2_s = z.log2_s;
    state.log2_t = z.log2_t;
  }
  return state;
}

// Loss and statistics of the row, written where `writes`; returns its coefficients.
template <class K>
FASTKD_DEVICE GradientCoefficients finish(const CudaLoss& call, int64_t n, const RowConstants& r, Piece row,
                                          const TermSums& terms, float label_logit, bool writes) {
  const LossParams& p = call.loss;
  row.columns = static_cast<float>(call.vocabulary);
  RowInputs in;
  in.needs_hard = r.needs_hard;
  in.label_logit = label_logit;
  in.token_weight = r.token_weight;
  in.gradient_scale = load(&call.scales->gradient_scale);
  in.wants_gradient = p.gradient.data != nullptr;
  const RowOutcome out = finish_row(r.options, r.softening, row, terms, in);
  if (writes) {
    store(p.row_loss + n, out.loss);
    if (K::kRich && p.stats) p.write_stats(n, out, [](float* to, float x) { store(to, x); });
  }
  return out.coefficients;
}

// The student's logit at the label, softcapped; read before anything is overwritten.
template <class K>
FASTKD_DEVICE float label_logit_of(const RowView& view, const RowConstants& r) {
  if (r.label < 0) return 0;
  Quad x;
  for (int i = 0; i < 4; ++i) x.value[i] = load_column(view.student, view.student_dtype, r.label);
  r.cap<K>(x, r.student_softcap);
  return x.value[0];
}

}  // namespace gpu
}  // namespace fastkd
