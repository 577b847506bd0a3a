// Rows with a sparse teacher: which columns of a place are named, the sums of the rest, the gradient.
#pragma once

#include "sparse_prepare.cuh"
#include "streaming.cuh"

namespace fastkd {
namespace gpu {

// What a sparse kernel is compiled for; divergence and tail branch uniformly, since only K columns a row see them.
template <bool kRichOf>
struct SparseKind {
  static constexpr bool kRich = kRichOf;
  static constexpr int kBoundingThreads = Kind<Divergence::forward_kl, kRichOf>::kBoundingThreads;
};

// The named columns of a row, by ascending column.
struct NamedEntries {
  const SparseEntry* entries;
  int count;

  FASTKD_DEVICE_METHOD SparseEntry at(int i) const { return load(entries + i); }
  FASTKD_DEVICE_METHOD int column(int i) const { return load(&entries[i].column); }

  FASTKD_DEVICE_METHOD bool names(int64_t column_asked) const {
    int first = 0;
    for (int left = count; left > 0;) {
      const int half = left / 2;
      const bool before = column(first + half) < column_asked;
      first = before ? first + half + 1 : first;
      left = before ? left - half - 1 : half;
    }
    return first < count && column(first) == column_asked;
  }
  // Bit j: the j-th column of a place of single columns is named.
  FASTKD_DEVICE_METHOD unsigned bits_of(const Place& at, int stride) const {
    unsigned bits = 0;
    for (int j = 0; j < at.n; ++j)
      if (names(at.first + static_cast<int64_t>(j) * stride)) bits |= 1u << j;
    return bits;
  }
};

// A byte a chunk of a part in shared memory: bit j says that the chunk's j-th column is named. Written four chunks at a
// time, by the thread of the first named column of the four.
struct NamedMap {
  uint32_t* words;

  // By the whole team; behind a barrier when it returns.
  FASTKD_DEVICE_METHOD void fill(const NamedEntries& named, const RowView& view, int begin, int chunks,
                                 const Team& team) const {
    for (int i = team.lane; i < (chunks + 15) / 16; i += team.lanes)
      shared_store(reinterpret_cast<Vector*>(words) + i, Vector{{0, 0, 0, 0}});
    block_sync();
    const int shift = view.access.width == 8 ? 3 : 2;
    const int first = view.head + (begin << shift);  // column of the part's first chunk
    const auto word_of = [&](int column) { return (column - first) >> (shift + 2); };
    for (int i = team.lane; i < named.count; i += team.lanes) {
      const int column = named.column(i), word = word_of(column);
      if (column < first || column - first >= chunks << shift) continue;
      if (i > 0 && word_of(named.column(i - 1)) == word) continue;
      uint32_t bits = 0;
      for (int j = i; j < named.count; ++j) {
        const int at = named.column(j) - first;
        if (at >> (shift + 2) != word || at >= chunks << shift) break;
        bits |= 1u << (8 * ((at >> shift) & 3) + (at & (view.access.width - 1)));
      }
      shared_store(words + word, bits);
    }
    block_sync();
  }
  FASTKD_DEVICE_METHOD unsigned bits_of(int i) const { return shared_load(words + (i >> 2)) >> (8 * (i & 3)) & 255; }
};

// s: capped logits, the first n of them columns of the row, the rest masked; named: bits.
template <class K>
FASTKD_DEVICE void add_rest_columns(StudentPiece& piece, Quad s, unsigned named, int first, int stride, int n,
                                    const RowConstants& r) {
  if (named) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.value[i] = named >> i & 1 ? minus_infinity() : s.value[i];
  }
  const float largest = largest_of(s);
  if ((largest - piece.largest) * r.softening.slope > r.slack) {
    const float reference = max(largest, piece.largest);
    piece.rebase(reference, reference, r.softening);
  }
  const Exponent<float> exponent = r.softening.relative_to(piece.largest);
  Quad y, e;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y.value[i] = exponent(s.value[i]);
    e.value[i] = exp2(y.value[i]);
    piece.sum += e.value[i];
    if (!K::kRich) continue;
    const bool counts = i < n && !(named >> i & 1);
    if (r.smoothing && counts) piece.linear += y.value[i];
    piece.columns += counts ? 1.0f : 0.0f;
    if (!r.stats) continue;
    piece.entropy += weigh(e.value[i], y.value[i]);
    if (s.value[i] > piece.top.logit) piece.top = {s.value[i], first + i * stride};
  }
  if (r.hard == Hard::none) return;
  const Quad hard = hard_exponentials(r, e, y);
#pragma unroll
  for (int i = 0; i < 4; ++i) piece.sum_hard += hard.value[i];
}

// As merge_lanes of Piece.
template <class K>
FASTKD_DEVICE StudentPiece merge_student(StudentPiece p, const RowConstants& r) {
  p.rebase(max_lanes(p.largest), max_lanes(p.peak), r.softening);
  p.sum = sum_lanes(p.sum);
  p.sum_hard = r.hard == Hard::none ? p.sum : sum_lanes(p.sum_hard);
  if (!K::kRich) return p;
  p.columns = sum_lanes(p.columns);
  p.linear = sum_lanes(p.linear);
  if (!r.stats) return p;
  p.entropy = sum_lanes(p.entropy);
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) take_top(p.top, lanes);
  return p;
}

// The rest's gradient of four columns.
template <class K>
FASTKD_DEVICE Quad rest_gradient(const Quad& s, int first, int stride, const SparseState& row, const RowConstants& r) {
  const Exponent<float> exponent = r.softening.relative_to(row.largest);
  Quad d, y, e;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y.value[i] = exponent(s.value[i]);
    e.value[i] = exp2(y.value[i]);
    d.value[i] = row.rest.student * e.value[i] + row.rest.constant;
  }
  add_hard_part<K>(d, s, y, e, first, stride, row.rest, r);
  return d;
}

// What the kernels do with a place's columns.
template <class K>
struct SparseSweep {
  const StudentView& view;
  const RowConstants& r;

  FASTKD_DEVICE_METHOD void sum(StudentPiece& piece, const Chunk& chunk, const Place& at, unsigned named) const {
    Sweep<K>{view, r}.quads(chunk, at, [&](const Quad& s, const Quad&, int q, int n) {
      add_rest_columns<K>(piece, s, named >> 4 * q & 15, at.first + 4 * q, view.stride, n, r);
    });
  }
  FASTKD_DEVICE_METHOD void gradient(const Chunk& chunk, const Place& at, const SparseState& row) const {
    Vector stored{};
    Sweep<K>{view, r}.quads(chunk, at, [&](const Quad& s, const Quad&, int q, int) {
      view.put(stored, rest_gradient<K>(s, at.first + 4 * q, view.stride, row, r), q);
    });
    view.store_gradient(at, stored);
  }
};

}  // namespace gpu
}  // namespace fastkd
