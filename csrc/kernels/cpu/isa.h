// What one instruction set offers: a table of functions, filled once per compilation of kernels.h.
#pragma once

#include <cstdint>

#include "../products_params.h"
#include "../shard_params.h"
#include "../sparse_params.h"

namespace fastkd {

// Columns of a block: both rows, both exponentials of a block stay in a 32 KiB first-level cache beside their source.
constexpr int kBlock = 2048;

inline constexpr int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

constexpr uintptr_t kPage = 4096;

// `array`, which has a page to spare, moved so that its columns lie `bytes` further in a page than those of `row`:
// arrays that all began at the same offset would meet in the same cache sets, as at V = 2^20, where it costs 4 %.
inline float* apart(float* array, const char* row, uintptr_t bytes) {
  const uintptr_t line = reinterpret_cast<uintptr_t>(row) / 64 * 64;
  return array + (line + bytes - reinterpret_cast<uintptr_t>(array)) % kPage / sizeof(float);
}

// Memory of one row under way: whole padded rows of exponentials with a page to spare each, and sums per block.
struct RowScratch {
  float *exp_s, *exp_t, *ratio, *exp_hard;
  Piece* pieces;
  TermSums* terms;
  bool* kept;  // per block: whether its exponentials wait for the last step, or are made again

  RowScratch apart_from(const char* row) const {
    RowScratch s = *this;
    s.exp_t = apart(exp_t, row, 2048);
    s.exp_s = apart(exp_s, row, 3072);
    s.ratio = apart(ratio, row, 1024);
    s.exp_hard = apart(exp_hard, row, 512);
    return s;
  }
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
