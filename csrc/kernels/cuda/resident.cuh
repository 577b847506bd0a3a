// A row that fits the shared memory of one warp, one block or one cluster of blocks: every logit is read once from
// global memory (asynchronous copies, of 16 bytes or in bulk), all sweeps run from shared memory, the gradient is
// written once. 3 N V for every divergence.
//
// A thread copies and reads only chunks of its own, so a copy needs no barrier: its thread waits for it. Or one thread
// has the copy engine bring a wave of chunks, and all wait for the wave's barrier.
#pragma once

#include "merge.cuh"

namespace fastkd {
namespace gpu {

FASTKD_DEVICE void wait_for_wave(int wave) {
  if (wave == 0) return copy_wait<3>();
  if (wave == 1) return copy_wait<2>();
  if (wave == 2) return copy_wait<1>();
  copy_wait<0>();
}

FASTKD_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

FASTKD_DEVICE void copy_chunk(char* to, const char* from, int bytes) {
  if (bytes == 16) {
    copy_async(to, from);
  } else {
    copy_async_half(to, from);
  }
}
FASTKD_DEVICE Vector load_chunk(const char* from, int bytes) {
  if (bytes == 16) return shared_load(reinterpret_cast<const Vector*>(from));
  const HalfVector half = shared_load(reinterpret_cast<const HalfVector*>(from));
  return {{half.word[0], half.word[1], 0, 0}};
}

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
#if FASTKD_BULK
  // Chunks first ... last - 1 of the part, from `column` on; to be called by one thread.
  FASTKD_DEVICE_METHOD void bring(const RowView& view, int64_t column, int first, int last, uint64_t* arrived) const {
    const int s = (last - first) * student_bytes, t = (last - first) * teacher_bytes;
    if (last <= first) return phases_arrive(arrived);
    phases_arrive_expecting(arrived, s + t);
    copy_bulk(student + first * student_bytes, view.student + column * size_of(view.student_dtype), s, arrived);
    copy_bulk(teacher + first * teacher_bytes, view.teacher + column * size_of(view.teacher_dtype), t, arrived);
  }
#endif
  FASTKD_DEVICE_METHOD Chunk load(int i) const {
    return {load_chunk(student + i * student_bytes, student_bytes),
            load_chunk(teacher + i * teacher_bytes, teacher_bytes)};
  }
};

// What the sweeps do with a place's columns, four at a time: one copy of the arithmetic however the columns were
// loaded.
template <class K>
struct Sweep {
  const RowView& view;
  const RowConstants& r;

  // f(student, teacher, quad, columns of it)
  template <class F>
  FASTKD_DEVICE_METHOD void quads(const Chunk& chunk, const Place& at, const F& f) const {
#pragma unroll 1
    for (int q = 0; 4 * q < at.n; ++q) {
      Quad s = unpack(chunk.student, view.student_dtype, q), t = unpack(chunk.teacher, view.teacher_dtype, q);
      r.cap<K>(s, r.student_softcap);
      r.cap<K>(t, r.teacher_softcap);
      f(s, t, q, at.n - 4 * q < 4 ? at.n - 4 * q : 4);
    }
  }
  FASTKD_DEVICE_METHOD void sum(Piece& piece, const Chunk& chunk, const Place& at) const {
    quads(chunk, at, [&](const Quad& s, const Quad& t, int q, int n) {
      add_columns<K>(piece, s, t, at.first + 4 * q, view.stride, n, r);
    });
  }
  FASTKD_DEVICE_METHOD void term(TermSums& sums, const Chunk& chunk, const Place& at, const RowState& row) const {
    if constexpr (!K::kMixed)
      quads(chunk, at, [&](const Quad& s, const Quad& t, int, int) { add_terms<K>(sums, s, t, row, r); });
  }
  FASTKD_DEVICE_METHOD void gradient(const Chunk& chunk, const Place& at, const RowState& row) const {
    Vector stored{};
    quads(chunk, at, [&](const Quad& s, const Quad& t, int q, int) {
      view.put(stored, gradient_of<K>(s, t, at.first + 4 * q, view.stride, row, r), q);
    });
    view.store_gradient(at, stored);
  }
};

// The part of row n that belongs to `team`; memory: the team's shared memory.
template <class K, bool kWarpTeam>
FASTKD_DEVICE void resident_row(const CudaLoss& call, int64_t n, const Team& team, char* memory) {
  const LossParams& p = call.loss;
  if (p.labels && load(p.labels + n) == p.ignore_index) return ignore_row(p, n, team);
  const RowView view(p, call.access, n, team.lanes);
  const RowConstants r(p, n);
  const Sweep<K> sweep{view, r};
  auto* scratch = reinterpret_cast<TeamScratch<kWarpTeam>*>(memory);
  const Stage stage(memory + sizeof(*scratch), call.team_chunks, view);
  const int begin = team.begin(view.chunks), chunks = team.end(view.chunks) - begin;
  const int heads = team.heads(view.head), edges = heads + team.tails(view.tail());
  // f(chunk, place) for this thread's edges (where with_edges) and chunks from `first` to `last` - 1 of the part
  const auto sweep_part = [&](bool with_edges, int first, int last, const auto& f) {
    int i = first + team.lane;
#pragma unroll 1
    for (int edge = with_edges ? 0 : edges; edge < edges || i < last;) {
      const bool whole = edge >= edges;
      const Place at = whole ? view.chunk(begin + i) : view.edge(edge, heads);
      f(whole ? stage.load(i) : view.load_columns(at), at);
      edge += whole ? 0 : 1;
      i += whole ? team.lanes : 0;
    }
  };

  // chunks of a wave: each thread has as many in every wave but the last
  const int wave_chunks = ((chunks + kCopyWaves - 1) / kCopyWaves + team.lanes - 1) / team.lanes * team.lanes;
  const auto end_of = [&](int wave) { return min_of((wave + 1) * wave_chunks, chunks); };
  const bool bulk = FASTKD_BULK && !kWarpTeam && call.bulk;
#if FASTKD_BULK
  if (bulk) {
    if (team.lane == 0) {
      for (int wave = 0; wave < kCopyWaves; ++wave) phases_init(scratch->arrived + wave, 1);
      fence_async();
      for (int wave = 0; wave < kCopyWaves; ++wave) {
        const int first = wave * wave_chunks;
        stage.bring(view, view.chunk(begin + first).first, first, end_of(wave), scratch->arrived + wave);
      }
    }
    block_sync();
  }
#endif
#pragma unroll 1
  for (int wave = 0; !bulk && wave < kCopyWaves; ++wave) {
    for (int i = wave * wave_chunks + team.lane; i < end_of(wave); i += team.lanes)
      stage.copy(view, view.chunk(begin + i).first, i);
    copy_commit();
  }
  const float label_logit = team.part == 0 && team.lane == 0 ? label_logit_of<K>(view, r) : 0;

  Piece piece;
#pragma unroll 1
  for (int wave = 0; wave < kCopyWaves; ++wave) {
#if FASTKD_BULK
    if (bulk) phases_wait(scratch->arrived + wave, 0);
#endif
    if (!bulk) wait_for_wave(wave);
    sweep_part(wave == 0, wave * wave_chunks, end_of(wave),
               [&](const Chunk& c, const Place& at) { sweep.sum(piece, c, at); });
  }

  const auto merge_pieces = [&](const Piece& x) { return merge_lanes<K>(x, r); };
  piece = kWarpTeam ? merge_pieces(piece) : merge_warps(piece, scratch->warp_pieces, merge_pieces);
  if (!kWarpTeam) piece = merge_cluster(piece, &scratch->piece, team, merge_pieces);
  RowState row = state_of<K>(piece);
  TermSums terms;
  if constexpr (!K::kMixed) {
    row = broadcast<kWarpTeam>(row, &scratch->before_terms, team);
    sweep_part(true, 0, chunks, [&](const Chunk& c, const Place& at) { sweep.term(terms, c, at, row); });
    const auto merge_terms = [](const TermSums& x) { return merge_lanes(x); };
    terms = kWarpTeam ? merge_terms(terms) : merge_warps(terms, scratch->warp_terms, merge_terms);
    if (!kWarpTeam) terms = merge_cluster(terms, &scratch->terms, team, merge_terms);
  }
  if (team.lane == 0) row.c = finish<K>(call, n, r, piece, terms, label_logit, team.part == 0);
  if (view.gradient) {
    row = broadcast<kWarpTeam>(row, &scratch->before_gradient, team);
    sweep_part(true, 0, chunks, [&](const Chunk& c, const Place& at) { sweep.gradient(c, at, row); });
    zero_gradient(p, n, p.columns, team);
  }
}

// One warp a row, several rows a block.
template <class K>
FASTKD_KERNEL(kWarpBlockThreads, 2)
warp_resident(FASTKD_CONSTANT CudaLoss call) {
  const int warp = thread_index() / kWarp;
  const int64_t n = block_index() * (block_threads() / kWarp) + warp;
  if (n >= call.loss.rows) return;
  const Team team{thread_index() % kWarp, kWarp, 0, 1};
  resident_row<K, true>(call, n, team, shared_memory() + static_cast<int64_t>(warp) * call.team_bytes);
}

// One cluster a row; a cluster may be a single block.
template <class K>
FASTKD_KERNEL(K::kBoundingThreads, 1)
block_resident(FASTKD_CONSTANT CudaLoss call) {
  const Team team{thread_index(), block_threads(), cluster_rank(), cluster_blocks()};
  resident_row<K, false>(call, block_index() / team.parts, team, shared_memory());
  if (team.parts > 1) cluster_sync();  // a peer may still be reading this block's sums
}

}  // namespace gpu
}  // namespace fastkd
