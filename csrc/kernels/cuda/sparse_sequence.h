// What one call with a sparse teacher enqueues.
#pragma once

#include "sequence.h"

namespace fastkd {

inline int64_t padded_k(int64_t k) {
  int64_t padded = 1;
  while (padded < k) padded *= 2;
  return padded;
}

struct SparseWorkspace {
  Space space;
  CallScales* scales;
  float* row_loss;
  StudentPiece* pieces;
  SparseHead* heads;
  SparseEntry* entries;
  int64_t* keys;

  SparseWorkspace(const CudaCall& c, const SparseTeacher& teacher, const Plan& plan)
      : space{static_cast<char*>(c.workspace)} {
    const int64_t rows = c.params.rows;
    scales = space.take<CallScales>(1);
    row_loss = space.take<float>(c.reduction == Reduction::none ? 0 : rows);
    pieces = space.take<StudentPiece>(plan.variant == Variant::streaming ? rows * plan.splits : 0);
    heads = space.take<SparseHead>(rows);
    entries = space.take<SparseEntry>(rows * teacher.k);
    keys = space.take<int64_t>(rows * padded_k(teacher.k));
  }
};

template <class Launch>
const char* launch_sparse_rows(const CudaSparse& sparse, const Plan& plan, const Launch& launch) {
  const LossParams& p = sparse.call.loss;
  const SparseKernels kernels = sparse_kernels(is_rich(p));
  const char* error = launch(kernels.prepare, sparse, p.rows, gpu::kWarp, 1, 0);
  if (error) return error;
  if (plan.variant != Variant::streaming)
    return launch(kernels.resident, sparse, plan.blocks, plan.threads, plan.cluster, plan.shared_bytes);
  error = launch(kernels.sums, sparse, p.rows * plan.splits, plan.threads, 1, plan.shared_bytes);
  const int64_t blocks = p.gradient.data ? plan.blocks : p.rows;
  return error ? error : launch(kernels.finish, sparse, blocks, plan.threads, 1, kSparseScratchBytes);
}

template <class Launch>
const char* enqueue_sparse(const CudaCall& c, const SparseTeacher& teacher, const Plan& plan, const Launch& launch) {
  const SparseWorkspace space(c, teacher, plan);
  CudaSparse sparse;
  sparse.call = loss_of(c, plan, space.row_loss, space.scales);
  sparse.call.loss.teacher = c.params.student;
  sparse.call.loss.teacher_softcap = 0;
  sparse.teacher = teacher;
  sparse.padded_k = padded_k(teacher.k);
  sparse.keys = space.keys;
  sparse.entries = space.entries;
  sparse.heads = space.heads;
  sparse.pieces = space.pieces;
  return enqueue(c, sparse.call, space.scales, plan, launch, [&] { return launch_sparse_rows(sparse, plan, launch); });
}

}  // namespace fastkd
