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

// A column among numbers of the same width.
FASTKD_FN float bits_of(int64_t column) {
  const int32_t narrow = static_cast<int32_t>(column);
  float bits;
  __builtin_memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

struct ShardCall {
  LossParams params;  // labels: a column of this shard, 0 where another has it, ignore_index; no row_loss
  ShardStep step = ShardStep::sums;
  int64_t first_column = 0;     // of the shard in the vocabulary
  int64_t vocabulary = 0;       // columns of all shards
  float* out = nullptr;         // sums: (kFields, N); terms: (2, N)
  const float* rows = nullptr;  // terms, gradient: (kRowFields, N)

  FASTKD_METHOD float* at(int field, int64_t n) const { return out + field * params.rows + n; }
  FASTKD_METHOD const float* row(int field, int64_t n) const { return rows + field * params.rows + n; }

  // write(address, number) for each sum of the piece of row n
  template <class Write>
  FASTKD_METHOD void write_sums(int64_t n, const Piece& piece, float label_logit, const Write& write) const {
    write(at(kLargestS, n), piece.largest_s);
    write(at(kLargestT, n), piece.largest_t);
    write(at(kSumS, n), piece.sum_s);
    write(at(kSumT, n), piece.sum_t);
    write(at(kDotT, n), piece.dot_t);
    write(at(kDotS, n), piece.dot_s);
    write(at(kSumHard, n), piece.sum_hard);
    write(at(kLabel, n), label_logit);
    write(at(kLinearS, n), piece.linear_s);
    write(at(kEntropyS, n), piece.entropy_s);
    write(at(kEntropyT, n), piece.entropy_t);
    write(at(kTopS, n), bits_of(piece.top_s.column + first_column));
    write(at(kTopT, n), bits_of(piece.top_t.column + first_column));
  }

  // What is known of the whole of row n; read(address) gives a number.
  template <class Read>
  FASTKD_METHOD Piece whole_row(int64_t n, const Read& read) const {
    Piece piece;
    piece.largest_s = read(row(kLargestS, n));
    piece.largest_t = read(row(kLargestT, n));
    piece.sum_s = read(row(kSumS, n));
    piece.sum_t = read(row(kSumT, n));
    piece.dot_t = read(row(kDotT, n));
    piece.dot_s = read(row(kDotS, n));
    piece.sum_hard = read(row(kSumHard, n));
    piece.columns = static_cast<float>(vocabulary);
    return piece;
  }
  // The same of its terms.
  template <class Read>
  FASTKD_METHOD TermSums whole_terms(int64_t n, const Read& read) const {
    return {0, read(row(kDlogq, n)) * kLog2e};  // in units of ln 2
  }
};

}  // namespace fastkd
