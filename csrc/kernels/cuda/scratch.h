// Shared memory of a team besides its logits, in bytes: known to the host, checked against the kernels' own layout.
#pragma once

#include "../../core/finish.h"

namespace fastkd {

// What every thread needs of the whole row after its sums are merged.
struct RowState {
  float largest_s = 0, largest_t = 0;
  float log2_s = 0, log2_t = 0, sum_s = 0;  // not for a mixed divergence
  GradientCoefficients c;
};

constexpr int kMaxWarps = 32;

// Nothing in it is written twice for one row.
template <bool kWarpTeam>
struct alignas(16) TeamScratch {
  Piece warp_pieces[kWarpTeam ? 1 : kMaxWarps], piece;
  TermSums warp_terms[kWarpTeam ? 1 : kMaxWarps], terms;
  RowState before_terms, before_gradient;
};

constexpr int kWarpScratchBytes = sizeof(TeamScratch<true>);
constexpr int kBlockScratchBytes = sizeof(TeamScratch<false>);

}  // namespace fastkd
