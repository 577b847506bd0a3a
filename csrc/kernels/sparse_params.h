// The teacher of a sparse call, as the kernels see it.
#pragma once

#include "../core/sparse.h"
#include "params.h"

namespace fastkd {

struct SparseTeacher {
  const int64_t* ids = nullptr;     // (N, K), contiguous; below 0: no entry
  const float* logprobs = nullptr;  // (N, K), natural logarithms
  const float* weights = nullptr;   // (N, K) or null: of the draws of Tail::sampled; null: 1 / number of draws each
  int64_t k = 0;
  Tail tail = Tail::bucket;
  float temperature = 0;  // at which the log-probabilities were taken; 0: at the row's own
  float resolution = 0;   // see SparseTail
  float mass_limit = 1;   // a larger sum of probabilities is an error
};

// To how much a sum of probabilities is known whose logarithms were stored with this unit roundoff, and how far above 1
// it may come out: that, or what a log-softmax over a large vocabulary loses.
inline constexpr float mass_resolution(float unit_roundoff) { return 8 * unit_roundoff; }
inline constexpr float mass_limit(float unit_roundoff) {
  const float resolution = mass_resolution(unit_roundoff);
  return 1 + (resolution > 0x1p-13f ? resolution : 0x1p-13f);
}

// One row of it: distinct columns in ascending order.
struct SparseRow {
  NamedColumn* named = nullptr;
  int64_t count = 0;
  SparseTail tail;
};

}  // namespace fastkd
