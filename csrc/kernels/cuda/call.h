// One call of the loss on the GPU, as its kernels see it: every pointer is device memory. Host and device; no CUDA.
#pragma once

#include "../shard_params.h"
#include "../sparse_params.h"

namespace fastkd {

// Written by the first kernel of a call, read by the others: nothing of it is known to the host.
struct CallScales {
  double normaliser = 1;     // 1 / denominator of the mean; 1 for the other reductions
  float gradient_scale = 1;  // what the stored gradient carries of it: all, or nothing in fp16
};

// How wide the accesses of a row are.
struct Access {
  int width = 8;        // columns of a chunk: 8 where both models are vectors of 2 bytes a column, else 4
  bool vectors = true;  // else the rows begin at different places between two boundaries: one column at a time
};

struct CudaLoss {
  LossParams loss;  // gradient_scale is in `scales`
  Access access;
  const CallScales* scales = nullptr;

  int team_bytes = 0;   // resident: shared memory of one row's part
  int team_chunks = 0;  // resident: chunks that it can hold of each model
  bool bulk = false;    // resident: brought by bulk copies rather than by every thread's own

  // streaming: a row is cut into `splits` parts, a block each
  int splits = 1;
  int sums_of_row = 1;            // of pieces and terms: one a part, or one where the whole row's are known
  Piece* pieces = nullptr;        // (N, sums_of_row)
  TermSums* terms = nullptr;      // (N, sums_of_row) when read, or null: a divergence of one sweep
  float* label_logits = nullptr;  // (N): read before anything is overwritten

  // other than the columns of `loss` where a process has a part of the vocabulary
  int64_t vocabulary = 0;
  const float* owned = nullptr;  // (N): 0 where the label is a column of another process; null: it never is

  float* total = nullptr;  // (1): the reduced loss, or null for Reduction::none
};

// A named column as the kernels keep it, and what else they keep of a row's teacher.
struct alignas(16) SparseEntry {
  int column;
  float log2_p, weight, logit;  // see NamedColumn
};
struct alignas(16) SparseHead {
  int count;   // of entries, by ascending column
  float rest;  // mass of the rest
  int wrong;   // 1: a value that no teacher may have; the row's loss and gradient are NaN
  float label_logit;
};

struct CudaSparse {
  CudaLoss call;  // its teacher is the student, its pieces are none
  SparseTeacher teacher;
  int64_t padded_k = 1;            // K up to a power of two
  int64_t* keys = nullptr;         // (N, padded_k)
  SparseEntry* entries = nullptr;  // (N, K)
  SparseHead* heads = nullptr;     // (N)
  StudentPiece* pieces = nullptr;  // streaming: (N, splits)
};

// Between the sweeps of a process's columns and what it exchanges with the others.
struct CudaShard {
  ShardCall shard;
  int splits = 1;  // parts of a row of the sweep whose sums are gathered
  CallScales* scales = nullptr;
  Piece* pieces = nullptr;
  TermSums* terms = nullptr;
  float* label_logits = nullptr;  // (N)
};

// The scales of a call: the sum of the weights of the rows that count, or a given number of items.
struct CudaScales {
  LossParams loss;
  Reduction reduction = Reduction::mean;
  const float* num_items = nullptr;
  CallScales* scales = nullptr;
  float* pending = nullptr;  // (1): what the stored gradient still has to be multiplied by, besides the upstream
};

struct CudaRescale {
  RescaleParams rescale;           // `common` is unused: see pending
  const float* pending = nullptr;  // (1)
  Access access;
  int splits = 1;
};

}  // namespace fastkd
