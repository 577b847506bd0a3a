// A row that fits the shared memory of one warp, one block or one cluster of blocks: every logit is read once from
// global memory (asynchronous copies of 16 bytes), all sweeps run from shared memory, the gradient is written once.
// 3 N V for every divergence.
//
// A thread copies and reads only chunks of its own, so a copy needs no barrier: its thread waits for it.
#pragma once

#include "merge.cuh"

namespace fastkd {
namespace gpu {

constexpr int kWaves = 4;  // groups of copies: the first is summed while the others are under way

// The part's chunks in shared memory, first the student's, then the teacher's.
struct Stage {
  char* student;
  int student_bytes, teacher_bytes;  // of a chunk: 16, or 8
  char* teacher;

  FASTKD_DEVICE_METHOD Stage(char* memory, int capacity, const RowView& view)
      : student(memory),
        student_bytes(view.chunk_bytes(view.student_dtype)),
        teacher_bytes(view.chunk_bytes(view.teacher_dtype)),
        teacher(memory + (static_cast<int64_t>(capacity) * student_bytes + 15) / 16 * 16) {}

  FASTKD_DEVICE_METHOD void copy(const RowView& view, int64_t column, int i) const {
    copy_chunk(student + i * student_bytes, view.student + column * size_of(view.student_dtype), student_bytes);
    copy_chunk(teacher + i * teacher_bytes, view.teacher + column * size_of(view.teacher_dtype), teacher_bytes);
  }
  FASTKD_DEVICE_METHOD Chunk load(int i) const {
    return {load_chunk(student + i * student_bytes, student_bytes),
            load_chunk(teacher + i * teacher_bytes, teacher_bytes)};
  }

 private:
  FASTKD_DEVICE_METHOD static void copy_chunk(char* to, const char* from, int bytes) {
    if (bytes == 16) {
      copy_async(to, from);
    } else {
      copy_async_half(to, from);
    }
  }
  FASTKD_DEVICE_METHOD static Vector load_chunk(const char* from, int bytes) {
    if (bytes == 16) return shared_load(reinterpret_cast<const Vector*>(from));
    const HalfVector half = shared_load(reinterpret_cast<const HalfVector*>(from));
    return {{half.word[0], half.word[1], 0, 0}};
  }
};

// Calls f(chunk, student dtype, teacher dtype, place, whole) for the edges that belong to this thread.
template <class F>
FASTKD_DEVICE void for_edges(const RowView& view, const Team& team, const F& f) {
  const bool head = team.has_head(), tail = team.has_tail();
  for (int k = 0; head && 4 * k < view.head; ++k) {
    const Place at = view.edge(0, view.head, k);
    f(view.load_columns(at), DType::float32, DType::float32, at, false);
  }
  for (int k = 0; tail && 4 * k < view.tail(); ++k) {
    const Place at = view.edge(view.columns - view.tail(), view.columns, k);
    f(view.load_columns(at), DType::float32, DType::float32, at, false);
  }
}

template <class K>
struct Sweep {
  const RowView& view;
  const RowConstants& r;

  // f(student, teacher, first column, stride, columns) for the quads of a chunk.
  template <class F>
  FASTKD_DEVICE_METHOD void quads(const Chunk& chunk, DType ds, DType dt, const Place& at, const F& f) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (4 * q >= at.n) continue;
      Quad s = unpack(chunk.student, ds, q), t = unpack(chunk.teacher, dt, q);
      r.cap<K>(s, r.student_softcap);
      r.cap<K>(t, r.teacher_softcap);
      f(s, t, q, at.n - 4 * q < 4 ? at.n - 4 * q : 4);
    }
  }
  FASTKD_DEVICE_METHOD void sum(Piece& piece, const Chunk& chunk, DType ds, DType dt, const Place& at) const {
    quads(chunk, ds, dt, at, [&](const Quad& s, const Quad& t, int q, int n) {
      add_columns<K>(piece, s, t, at.first + 4 * q * at.stride, at.stride, n, r);
    });
  }
  FASTKD_DEVICE_METHOD void term(TermSums& sums, const Chunk& chunk, DType ds, DType dt, const Place& at,
                                 const RowState& row) const {
    if constexpr (!K::kMixed)
      quads(chunk, ds, dt, at, [&](const Quad& s, const Quad& t, int, int) { add_terms<K>(sums, s, t, row, r); });
  }
  FASTKD_DEVICE_METHOD void gradient(const Chunk& chunk, DType ds, DType dt, const Place& at, bool whole,
                                     const RowState& row) const {
    float d[kMaxWidth] = {};
    quads(chunk, ds, dt, at, [&](const Quad& s, const Quad& t, int q, int) {
      const Quad four = gradient_of<K>(s, t, at.first + 4 * q * at.stride, at.stride, row, r);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[4 * q + i] = four.value[i];
    });
    view.store_gradient(at, whole, d);
  }
};

// The part of row n that belongs to `team`; memory: the team's shared memory.
template <class K, bool kWarpTeam>
FASTKD_DEVICE void resident_row(const CudaLoss& call, int64_t n, const Team& team, char* memory) {
  const LossParams& p = call.loss;
  if (p.labels && load(p.labels + n) == p.ignore_index) return ignore_row(p, n, team);
  const RowView view(p, call.access, n);
  const RowConstants r(p, n);
  const Sweep<K> sweep{view, r};
  const DType ds = view.student_dtype, dt = view.teacher_dtype;
  auto* scratch = reinterpret_cast<TeamScratch<kWarpTeam>*>(memory);
  const Stage stage(memory + sizeof(*scratch), call.team_chunks, view);
  const int begin = team.begin(view.chunks), end = team.end(view.chunks);
  const int per_wave = ((end - begin + kWaves - 1) / kWaves + team.lanes - 1) / team.lanes * team.lanes;
  const auto place = [&](int i) {
    return Place{view.head + static_cast<int64_t>(begin + i) * view.access.width, view.access.width, 1};
  };
  const auto last = [&](int wave) { return (wave + 1) * per_wave < end - begin ? (wave + 1) * per_wave : end - begin; };

#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave) {
    for (int i = wave * per_wave + team.lane; i < last(wave); i += team.lanes) stage.copy(view, place(i).first, i);
    copy_commit();
  }
  const float label_logit = team.part == 0 && team.lane == 0 ? label_logit_of<K>(view, r) : 0;

  Piece piece;
  for_edges(view, team,
            [&](const Chunk& c, DType s, DType t, const Place& at, bool) { sweep.sum(piece, c, s, t, at); });
  const auto sum_wave = [&](int wave) {
    for (int i = wave * per_wave + team.lane; i < last(wave); i += team.lanes)
      sweep.sum(piece, stage.load(i), ds, dt, place(i));
  };
  copy_wait<3>();
  sum_wave(0);
  copy_wait<2>();
  sum_wave(1);
  copy_wait<1>();
  sum_wave(2);
  copy_wait<0>();
  sum_wave(3);

  const auto merge_pieces = [&](const Piece& x) { return merge_lanes<K>(x, r); };
  piece = kWarpTeam ? merge_pieces(piece) : merge_warps(piece, scratch->warp_pieces, merge_pieces);
  if (!kWarpTeam) piece = merge_cluster(piece, &scratch->piece, team, merge_pieces);
  RowState row = state_of<K>(piece);
  TermSums terms;
  if constexpr (!K::kMixed) {
    row = broadcast<kWarpTeam>(row, &scratch->before_terms, team);
    for_edges(view, team,
              [&](const Chunk& c, DType s, DType t, const Place& at, bool) { sweep.term(terms, c, s, t, at, row); });
    for (int i = team.lane; i < end - begin; i += team.lanes) sweep.term(terms, stage.load(i), ds, dt, place(i), row);
    const auto merge_terms = [](const TermSums& x) { return merge_lanes(x); };
    terms = kWarpTeam ? merge_terms(terms) : merge_warps(terms, scratch->warp_terms, merge_terms);
    if (!kWarpTeam) terms = merge_cluster(terms, &scratch->terms, team, merge_terms);
  }
  if (team.lane == 0) row.c = finish<K>(p, call.scales, n, r, piece, terms, label_logit, team.part == 0);
  if (view.gradient) {
    row = broadcast<kWarpTeam>(row, &scratch->before_gradient, team);
    for_edges(view, team, [&](const Chunk& c, DType s, DType t, const Place& at, bool whole) {
      sweep.gradient(c, s, t, at, whole, row);
    });
    for (int i = team.lane; i < end - begin; i += team.lanes)
      sweep.gradient(stage.load(i), ds, dt, place(i), true, row);
    zero_gradient(p, n, p.columns, team);
  }
}

// One warp a row, several rows a block.
template <class K>
FASTKD_KERNEL(256, 2)
warp_resident(FASTKD_CONSTANT CudaLoss call) {
  const int warp = thread_index() / kWarp;
  const int64_t n = block_index() * (block_threads() / kWarp) + warp;
  if (n >= call.loss.rows) return;
  const Team team{thread_index() % kWarp, kWarp, 0, 1};
  resident_row<K, true>(call, n, team, shared_memory() + static_cast<int64_t>(warp) * call.team_bytes);
}

// One cluster a row; a cluster may be a single block.
template <class K>
FASTKD_KERNEL(768, 1)
block_resident(FASTKD_CONSTANT CudaLoss call) {
  const Team team{thread_index(), block_threads(), cluster_rank(), cluster_blocks()};
  resident_row<K, false>(call, block_index() / team.parts, team, shared_memory());
  if (team.parts > 1) cluster_sync();  // a peer may still be reading this block's sums
}

}  // namespace gpu
}  // namespace fastkd
