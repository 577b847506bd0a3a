// The kernels with a sparse teacher. Resident: the student's row in the shared memory of a block or cluster, read once
// and written once: 2 N V. Streaming: read twice, 3 N V. The sweeps see all columns but the named ones as one kind; the
// named ones' gradients, K a row, are written over what the last sweep left there.
#pragma once

#include "sparse_columns.cuh"

namespace fastkd {
namespace gpu {

// One row of the call, as each of its threads sees it.
template <class K>
struct SparseRowView {
  const CudaSparse& call;
  int64_t n;
  SparseHead head;
  StudentView view;
  RowConstants r;
  NamedEntries named;

  FASTKD_DEVICE_METHOD SparseRowView(const CudaSparse& c, int64_t row, const Team& team)
      : call(c),
        n(row),
        head(load(c.heads + row)),
        view(c.call.loss, c.call.access, row, team.lanes),
        r(c.call.loss, row),
        named{c.entries + row * c.teacher.k, head.count} {
    if (head.wrong) r.token_weight = 0 * minus_infinity();
  }
  FASTKD_DEVICE_METHOD SparseTail tail() const { return {call.teacher.tail, head.rest, call.teacher.resolution}; }
  FASTKD_DEVICE_METHOD static NamedColumn column_of(const SparseEntry& e) {
    return {e.column, e.log2_p, e.weight, e.logit};
  }
  FASTKD_DEVICE_METHOD RowInputs inputs() const {
    RowInputs in;
    in.needs_hard = r.needs_hard;
    in.label_logit = head.label_logit;
    in.token_weight = r.token_weight;
    in.gradient_scale = load(&call.call.scales->gradient_scale);
    in.wants_gradient = view.gradient != nullptr;
    return in;
  }

  // The named columns joined to the rest's sums, and their exponentials; by a warp, the same in every lane.
  FASTKD_DEVICE_METHOD NamedSums join(StudentPiece& rest, int lane) const {
    float peak = minus_infinity();
    for (int i = lane; i < named.count; i += kWarp) peak = max(named.at(i).logit, peak);
    rest.rebase(rest.largest, max(max_lanes(peak), rest.peak), r.softening);
    const Exponent<float> exponent = r.softening.relative_to(rest.peak);
    NamedSums sums;
    float linear = 0;
    Top top;
    for (int i = lane; i < named.count; i += kWarp) {
      const SparseEntry e = named.at(i);
      const float y = exponent(e.logit);
      sums.add(y, r.softening.temperature);
      if (K::kRich && r.smoothing) linear += y;
      if (K::kRich && r.stats) take_top(top, Top{e.logit, e.column});
    }
    sums.sum = sum_lanes(sums.sum);
    sums.sum_hard = sum_lanes(sums.sum_hard);
    if (!K::kRich) return sums;
    rest.linear += sum_lanes(linear);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) take_top(top, lanes);
    take_top(rest.top, top);
    return sums;
  }

  // Terms of all outcomes; by a warp, the same in every lane.
  FASTKD_DEVICE_METHOD SparseTerms terms(const StudentRow& student, int lane, NamedStatistics& statistics) const {
    const Exponent<float> exponent = r.softening.relative_to(student.all.largest_s);
    const SparseTail rest = tail();
    SparseTerms sums;
    for (int i = lane; i < named.count; i += kWarp) {
      const NamedColumn c = column_of(named.at(i));
      const float y = exponent(c.logit);
      add_named(sums, named_term(r.options, student.log2_sum, rest, c, y), rest, c);
      if (!K::kRich || !r.stats) continue;
      statistics.entropy += named_entropy(student.log2_sum, y);
      statistics.teacher.merge({c.log2_p, c.column});
    }
    sums.value = sum_lanes(sums.value);
    sums.dlogq = sum_lanes(sums.dlogq);
    if (K::kRich && r.stats) {
      sums.teacher_entropy = sum_lanes(sums.teacher_entropy);
      statistics.entropy = sum_lanes(statistics.entropy);
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) take_top(statistics.teacher, lanes);
    }
    add_rest(sums, r.options, student, rest);
    return sums;
  }

  // Loss and statistics of the row, written where `writes`; by a warp that has the rest's sums in every lane.
  FASTKD_DEVICE_METHOD SparseState finish(StudentPiece rest, int lane, bool writes) const {
    const LossParams& p = call.call.loss;
    const NamedSums sums = join(rest, lane);
    rest.columns = static_cast<float>(p.columns);
    if (head.wrong) rest.sum = 0 * minus_infinity();
    const StudentRow student(r.softening, rest, sums);
    NamedStatistics statistics;
    const SparseTerms outcomes = terms(student, lane, statistics);
    const bool with_stats = K::kRich && r.stats;
    SparseState state{rest.largest, rest.peak, student.log2_sum, {}, {}};
    if (lane != 0) return state;
    const RowInputs in = inputs();
    const RowOutcome out = sparse_outcome(r.options, r.softening, rest, student, outcomes, in, statistics, with_stats);
    if (writes) {
      store(p.row_loss + n, out.loss);
      if (with_stats) p.write_stats(n, out, [](float* to, float x) { store(to, x); });
    }
    if (!in.wants_gradient) return state;
    const SparseGradient gradient = sparse_gradient_of(r.options, r.softening, student, rest, outcomes, in);
    state.rest = gradient.rest;
    state.named = gradient.named;
    return state;
  }

  // Gradients of the named columns from `first` to `end` - 1, by a warp: over what the sweep of the rest has stored.
  FASTKD_DEVICE_METHOD void store_named(const SparseState& state, int first, int end, int lane) const {
    const Exponent<float> exponent = r.softening.relative_to(state.peak);
    for (int i = lane; i < named.count; i += kWarp) {
      const NamedColumn c = column_of(named.at(i));
      if (c.column < first || c.column >= end) continue;
      const float y = exponent(c.logit);
      const Term<float> term = named_term(r.options, state.log2_sum, tail(), c, y);
      float d = state.named.at(y, term.dlogq, r.options.temperature);
      if (c.column == r.label) d += state.rest.label;
      if (K::kRich && r.student_softcap != 0) d *= softcap_slope(c.logit, 1 / r.student_softcap);
      Vector stored{};
      view.put(stored, {{d, 0, 0, 0}}, 0);
      view.store_gradient({static_cast<int>(c.column), 1}, stored);
    }
  }

  // The part's gradients: of the rest by `sweep(state)`, then of the named columns.
  template <class Sweep>
  FASTKD_DEVICE_METHOD void gradient(SparseState state, SparseState* shared, const Team& team,
                                     const Sweep& sweep) const {
    sweep(broadcast<false>(state, shared, team));
    block_sync();  // what the others stored is overwritten
    if (team.lane >= kWarp) return;
    const int begin = team.begin(view.chunks), end = team.end(view.chunks);
    store_named(shared_load(shared), view.first_of(begin, team.part == 0),
                view.end_of(end, team.part == team.parts - 1), team.lane);
  }
};

// A part of a row as its team sweeps it: edges from global memory, chunks from the stage.
template <class View, class Stage>
struct ResidentPart {
  const View& view;
  const Stage& stage;
  const Team& team;
  int begin, chunks;  // of the row's: the part's first, and how many
  int heads, edges;   // edges of this thread
  int wave_chunks;    // each thread has as many in every wave but the last

  FASTKD_DEVICE_METHOD ResidentPart(const View& v, const Stage& s, const Team& t)
      : view(v),
        stage(s),
        team(t),
        begin(t.begin(v.chunks)),
        chunks(t.end(v.chunks) - begin),
        heads(t.heads(v.head)),
        edges(heads + t.tails(v.tail())),
        wave_chunks(((chunks + kCopyWaves - 1) / kCopyWaves + t.lanes - 1) / t.lanes * t.lanes) {}

  FASTKD_DEVICE_METHOD int end_of(int wave) const { return min_of((wave + 1) * wave_chunks, chunks); }

  FASTKD_DEVICE_METHOD void copy_waves() const {
#pragma unroll 1
    for (int wave = 0; wave < kCopyWaves; ++wave) {
      for (int i = wave * wave_chunks + team.lane; i < end_of(wave); i += team.lanes)
        stage.copy(view, view.chunk(begin + i).first, i);
      copy_commit();
    }
  }

  // f(chunk, place, i) for this thread's edges (where with_edges; i = -1) and chunks i from `first` to `last` - 1 of
  // the part
  template <class F>
  FASTKD_DEVICE_METHOD void sweep(bool with_edges, int first, int last, const F& f) const {
    int i = first + team.lane;
#pragma unroll 1
    for (int edge = with_edges ? 0 : edges; edge < edges || i < last;) {
      const bool whole = edge >= edges;
      const Place at = whole ? view.chunk(begin + i) : view.edge(edge, heads);
      f(whole ? stage.load(i) : view.load_columns(at), at, whole ? i : -1);
      edge += whole ? 0 : 1;
      i += whole ? team.lanes : 0;
    }
  }
  template <class F>
  FASTKD_DEVICE_METHOD void sweep_all(const F& f) const {
    sweep(true, 0, chunks, f);
  }
  // Wave by wave, as they arrive.
  template <class F>
  FASTKD_DEVICE_METHOD void sweep_waves(const F& f) const {
#pragma unroll 1
    for (int wave = 0; wave < kCopyWaves; ++wave) {
      wait_for_wave(wave);
      sweep(wave == 0, wave * wave_chunks, end_of(wave), f);
    }
  }
};

// The student's chunks in shared memory.
struct StudentStage {
  char* student;
  int bytes;  // of a chunk

  FASTKD_DEVICE_METHOD void copy(const StudentView& view, int64_t column, int i) const {
    copy_chunk(student + i * bytes, view.student + column * size_of(view.student_dtype), bytes);
  }
  FASTKD_DEVICE_METHOD Chunk load(int i) const { return {load_chunk(student + i * bytes, bytes), {}}; }
};

template <class K>
FASTKD_DEVICE void sparse_resident_row(const CudaSparse& call, int64_t n, const Team& team, char* memory) {
  const LossParams& p = call.call.loss;
  if (p.labels && load(p.labels + n) == p.ignore_index) return ignore_row(p, n, team);
  const SparseRowView<K> row(call, n, team);
  const SparseSweep<K> sweep{row.view, row.r};
  auto* scratch = reinterpret_cast<SparseScratch*>(memory);
  const int capacity = call.call.team_chunks, bytes = row.view.chunk_bytes(row.view.student_dtype);
  const StudentStage stage{memory + sizeof(*scratch), bytes};
  const NamedMap map{
      reinterpret_cast<uint32_t*>(stage.student + (static_cast<int64_t>(capacity) * bytes + 15) / 16 * 16)};
  const ResidentPart<StudentView, StudentStage> part(row.view, stage, team);
  part.copy_waves();
  map.fill(row.named, row.view, part.begin, part.chunks, team);
  StudentPiece rest;
  part.sweep_waves([&](const Chunk& c, const Place& at, int i) {
    sweep.sum(rest, c, at, i >= 0 ? map.bits_of(i) : row.named.bits_of(at, 1));
  });
  const auto merge = [&](const StudentPiece& x) { return merge_student<K>(x, row.r); };
  rest = merge_cluster(merge_warps(rest, scratch->warp_pieces, merge), &scratch->piece, team, merge);
  SparseState state;
  if (team.lane < kWarp) state = row.finish(rest, team.lane, team.part == 0);
  if (!row.view.gradient) return;
  row.gradient(state, &scratch->before_gradient, team, [&](const SparseState& s) {
    part.sweep_all([&](const Chunk& c, const Place& at, int) { sweep.gradient(c, at, s); });
  });
}

// One cluster a row; a cluster may be a single block.
template <class K>
FASTKD_KERNEL(K::kBoundingThreads, 1)
sparse_resident(FASTKD_CONSTANT CudaSparse call) {
  const Team team{thread_index(), block_threads(), cluster_rank(), cluster_blocks()};
  sparse_resident_row<K>(call, block_index() / team.parts, team, shared_memory());
  if (team.parts > 1) cluster_sync();  // a peer may still be reading this block's sums
}

template <class K>
FASTKD_KERNEL(kStreamThreads, 2)
sparse_sums(FASTKD_CONSTANT CudaSparse call) {
  const LossParams& p = call.call.loss;
  const int64_t n = block_index() / call.call.splits;
  if (p.labels && load(p.labels + n) == p.ignore_index) return;
  const Team team = stream_team(call.call);
  const SparseRowView<K> row(call, n, team);
  const SparseSweep<K> sweep{row.view, row.r};
  auto* scratch = reinterpret_cast<SparseScratch*>(shared_memory());
  const NamedMap map{reinterpret_cast<uint32_t*>(scratch + 1)};
  const int begin = team.begin(row.view.chunks), shift = row.view.access.width == 8 ? 3 : 2;
  if (row.view.access.vectors) map.fill(row.named, row.view, begin, team.end(row.view.chunks) - begin, team);
  StudentPiece rest;
  stream<true>(row.view, team, [&](const Chunk& c, const Place& at) {
    const bool whole = row.view.whole(at);
    sweep.sum(
        rest, c, at,
        whole ? map.bits_of(((at.first - row.view.head) >> shift) - begin) : row.named.bits_of(at, row.view.stride));
  });
  rest = merge_warps(rest, scratch->warp_pieces, [&](const StudentPiece& x) { return merge_student<K>(x, row.r); });
  if (team.lane == 0) store(call.pieces + n * call.call.splits + team.part, rest);
}

// Loss and gradient. A block a row suffices where there is no gradient.
template <class K>
FASTKD_KERNEL(kStreamThreads, 2)
sparse_finish(FASTKD_CONSTANT CudaSparse call) {
  const LossParams& p = call.call.loss;
  const bool wants_gradient = p.gradient.data != nullptr;
  const int splits = call.call.splits;
  const int64_t n = wants_gradient ? block_index() / splits : block_index();
  const Team team = wants_gradient ? stream_team(call.call) : Team{thread_index(), block_threads(), 0, 1};
  if (p.labels && load(p.labels + n) == p.ignore_index) return ignore_row(p, n, team);
  const SparseRowView<K> row(call, n, team);
  SparseState state;
  if (team.lane < kWarp) {
    const StudentPiece rest = merge_parts(call.pieces + n * splits, splits, team.lane,
                                          [&](const StudentPiece& x) { return merge_student<K>(x, row.r); });
    state = row.finish(rest, team.lane, team.part == 0);
  }
  if (!wants_gradient) return;
  const SparseSweep<K> sweep{row.view, row.r};
  auto* scratch = reinterpret_cast<SparseScratch*>(shared_memory());
  row.gradient(state, &scratch->before_gradient, team, [&](const SparseState& s) {
    stream<false>(row.view, team, [&](const Chunk& c, const Place& at) { sweep.gradient(c, at, s); });
  });
}

}  // namespace gpu
}  // namespace fastkd
