// What one instruction set offers: a table of functions, filled once per compilation of kernels.h.
#pragma once

#include "../products_params.h"
#include "../shard_params.h"
#include "../sparse_params.h"

namespace fastkd {

// Columns of a block: both rows, both exponentials of a block stay in a 32 KiB first-level cache beside their source.
constexpr int kBlock = 2048;

inline constexpr int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

// Memory of one row under way: whole padded rows of exponentials, and sums per block.
struct RowScratch {
  float *exp_s, *exp_t, *ratio, *exp_hard;
  Piece* pieces;
  TermSums* terms;
  bool* kept;  // per block: whether its exponentials wait for the last step, or are made again
};

// The same for a row with a sparse teacher.
struct SparseScratch {
  float *exponentials, *exp_hard;
  StudentPiece* pieces;
};

struct CpuKernels {
  const char* name;
  int lanes;  // floats per vector
  // rows [begin, end), each by the calling thread alone
  void (*rows)(const LossParams&, int64_t begin, int64_t end, const RowScratch&);
  // one row by all threads of the executor
  void (*shared_row)(const LossParams&, int64_t row, const RowScratch&, const Executor&);
  void (*rescale)(const RescaleParams&, int64_t begin, int64_t end);
  // one row that is not ignored; by all threads of the executor, or by the calling one alone where there is none
  void (*sparse_row)(const LossParams&, int64_t row, const SparseRow&, const SparseScratch&, const Executor*);
  // one row of a shard, ignored or not, likewise
  void (*shard_row)(const ShardCall&, int64_t row, const RowScratch&, const Executor*);
  // rows; tiles of kTurnedRows rows
  void (*add)(const AddParams&, int64_t begin, int64_t end);
  void (*turn)(const TurnParams&, int64_t begin, int64_t end);
};

extern const CpuKernels kBaselineKernels, kAvx2Kernels, kAvx512Kernels;

// The kernels in use: the best that this machine runs, or the one that FASTKD_CPU_ISA names. nullptr where it names
// none that runs here; `error` then says which do. Decided once.
const CpuKernels* selected_kernels(const char** error);

// Names of the instruction sets that this machine runs, best last, separated by commas.
const char* runnable_isas();

}  // namespace fastkd
