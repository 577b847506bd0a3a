// The columns of a vocabulary that one process holds: what of a call runs between the exchanges of its group.
#pragma once

#include "params.h"

namespace fastkd {

// Rows of the sums of a piece, (kFields, N); fastkd/shard_rows.py has the same list.
enum ShardField {
  kLargestS,
  kLargestT,
  kSumS,
  kSumT,
  kDotT,
  kDotS,
  kSumHard,
  kLabel,
  kLinearS,
  kEntropyS,
  kEntropyT,
  kTopS,  // a column of the whole vocabulary, int32
  kTopT,
  kFields
};

// Rows of what the gradient needs of the whole row, (kRowFields, N): the first seven of the above, then these.
enum ShardRowField { kDlogq = kSumHard + 1, kScale, kOwned, kRowFields };

enum class ShardStep { sums, terms, gradient };

struct ShardCall {
  LossParams params;  // labels: a column of this shard, 0 where another has it, ignore_index; no row_loss
  ShardStep step = ShardStep::sums;
  int64_t first_column = 0;     // of the shard in the vocabulary
  int64_t vocabulary = 0;       // columns of all shards
  float* out = nullptr;         // sums: (kFields, N); terms: (2, N)
  const float* rows = nullptr;  // terms, gradient: (kRowFields, N)

  FASTKD_METHOD float& at(int field, int64_t n) const { return out[field * params.rows + n]; }
  FASTKD_METHOD float row(int field, int64_t n) const { return rows[field * params.rows + n]; }
};

}  // namespace fastkd
