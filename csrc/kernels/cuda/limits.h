// What the host's launch arithmetic and the kernels must agree on: threads of a block, shared memory besides the
// logits.
#pragma once

#include "../../core/sparse.h"

namespace fastkd {

// What every thread needs of the whole row after its sums are merged.
struct RowState {
  float largest_s = 0, largest_t = 0;
  float log2_s = 0, log2_t = 0, sum_s = 0;  // not for a mixed divergence
  GradientCoefficients c;
};

// Most threads of a block, by kernel: they bound the registers.
constexpr int kWarpBlockThreads = 256;
constexpr int kResidentThreads = 512;
constexpr int kStreamThreads = 256;
constexpr int kOneBlockThreads = 1024;  // of the kernels that have one block

constexpr int kMaxWarps = kResidentThreads / 32;

constexpr int kCopyWaves = 4;  // in which a resident row arrives: the first is summed while the others are under way

// Nothing in it is written twice for one row.
template <bool kWarpTeam>
struct alignas(16) TeamScratch {
  uint64_t arrived[kWarpTeam ? 1 : kCopyWaves];  // barriers of the waves, where bulk copies bring them
  Piece warp_pieces[kWarpTeam ? 1 : kMaxWarps], piece;
  TermSums warp_terms[kWarpTeam ? 1 : kMaxWarps], terms;
  RowState before_terms, before_gradient;
};

// What is needed of a row with a sparse teacher: by every thread for the gradient of the rest, and by the first warp
// for that of the named columns.
struct SparseState {
  float largest = 0, peak = 0, log2_sum = 0;
  GradientCoefficients rest;
  NamedGradient named;
};
struct alignas(16) SparseScratch {
  StudentPiece warp_pieces[kMaxWarps], piece;
  SparseState before_gradient;
};

constexpr int kWarpScratchBytes = sizeof(TeamScratch<true>);
constexpr int kBlockScratchBytes = sizeof(TeamScratch<false>);
constexpr int kSparseScratchBytes = sizeof(SparseScratch);

}  // namespace fastkd
