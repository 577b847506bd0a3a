// What one call enqueues, whoever launches: the CUDA runtime, or the machine of tests/simt.
//
// Launch is called as launch(kernel, params, blocks, threads, cluster, shared_bytes) and returns what went wrong, or
// null.
#pragma once

#include "batch.cuh"
#include "launch.h"
#include "table.h"

namespace fastkd {

constexpr int kOneBlockShared = kOneBlockThreads / gpu::kWarp * static_cast<int>(sizeof(double));
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kWorkspaceAlignment = 16;
constexpr const char* kTooManyRows = "more rows than one launch can have blocks (2^31 - 1)";

inline bool is_rich(const LossParams& p) {
  return p.student_softcap != 0 || p.teacher_softcap != 0 || p.stats ||
         (p.needs_hard() && p.options.label_smoothing != 0);
}

inline KernelTable kernels_for(const LossParams& p) {
  const bool rich = is_rich(p);
  switch (p.options.divergence) {
    case Divergence::forward_kl: return forward_kl_kernels(rich);
    case Divergence::jsd: return jsd_kernels(rich);
    case Divergence::total_variation: return total_variation_kernels(rich);
    case Divergence::skew_forward_kl: return skew_forward_kl_kernels(rich);
    case Divergence::skew_reverse_kl: return skew_reverse_kl_kernels(rich);
    default: return symmetric_kl_kernels(rich);
  }
}

// A workspace, handed out one part behind the other; of null memory, to count its bytes.
struct Space {
  char* memory;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* const at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes +=
        (count * static_cast<int64_t>(sizeof(T)) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return at;
  }
};

struct Workspace {
  Space space;
  CallScales* scales;
  float *row_loss, *label_logits;
  Piece* pieces;
  TermSums* terms;

  Workspace(char* memory, int64_t rows, Reduction reduction, const Plan& plan) : space{memory} {
    const int64_t parts = plan.variant == Variant::streaming ? rows * plan.splits : 0;
    scales = space.take<CallScales>(1);
    row_loss = space.take<float>(reduction == Reduction::none ? 0 : rows);
    label_logits = space.take<float>(parts > 0 ? rows : 0);
    pieces = space.take<Piece>(parts);
    terms = space.take<TermSums>(parts);
  }
};

template <class Launch>
const char* launch_rows(const CudaLoss& call, const Plan& plan, const Launch& launch) {
  const KernelTable kernels = kernels_for(call.loss);
  if (plan.variant != Variant::streaming) {
    const KernelTable::Kernel kernel = plan.variant == Variant::warp ? kernels.warp : kernels.block;
    return launch(kernel, call, plan.blocks, plan.threads, plan.cluster, plan.shared_bytes);
  }
  const int64_t blocks = call.loss.rows * plan.splits;
  const char* error = launch(kernels.sums, call, blocks, plan.threads, 1, plan.shared_bytes);
  if (!error && kernels.terms) error = launch(kernels.terms, call, blocks, plan.threads, 1, plan.shared_bytes);
  return error ? error : launch(kernels.finish, call, plan.blocks, plan.threads, 1, plan.shared_bytes);
}

// What every kernel of a call is told, but where a streamed row's sums are.
inline CudaLoss loss_of(const CudaCall& c, const Plan& plan, float* row_loss, const CallScales* scales) {
  CudaLoss call;
  call.loss = c.params;
  call.loss.row_loss = c.reduction == Reduction::none ? c.loss : row_loss;
  call.access = plan.access;
  call.scales = scales;
  call.team_bytes = plan.team_bytes;
  call.team_chunks = plan.team_chunks;
  call.bulk = plan.bulk;
  call.splits = call.sums_of_row = plan.splits;
  call.vocabulary = c.params.columns;
  call.total = c.reduction == Reduction::none ? nullptr : c.loss;
  return call;
}

// The scales, the rows by `rows()`, the total.
template <class Launch, class Rows>
const char* enqueue(const CudaCall& c, const CudaLoss& call, CallScales* scales, const Plan& plan, const Launch& launch,
                    const Rows& rows) {
  if (plan.blocks > kMostBlocks || c.params.rows * plan.splits > kMostBlocks) return kTooManyRows;
  const CudaScales first{call.loss, c.reduction, c.num_items, scales, c.pending};
  const char* error = launch(gpu::scales_kernel, first, 1, kOneBlockThreads, 1, kOneBlockShared);
  if (!error && c.params.rows > 0) error = rows();
  if (!error && call.total) error = launch(gpu::total_kernel, call, 1, kOneBlockThreads, 1, kOneBlockShared);
  return error;
}

template <class Launch>
const char* enqueue_loss(const CudaCall& c, const Plan& plan, const Launch& launch) {
  const Workspace space(static_cast<char*>(c.workspace), c.params.rows, c.reduction, plan);
  CudaLoss call = loss_of(c, plan, space.row_loss, space.scales);
  call.pieces = space.pieces;
  call.terms = space.terms;
  call.label_logits = space.label_logits;
  return enqueue(c, call, space.scales, plan, launch, [&] { return launch_rows(call, plan, launch); });
}

template <class Launch>
const char* enqueue_rescale(const RescaleParams& params, const float* pending, const GpuLimits& gpu,
                            const Launch& launch) {
  if (params.rows == 0) return nullptr;
  CudaRescale call;
  call.rescale = params;
  call.pending = pending;
  call.access = access_of(params.source, params.source, params.gradient, params.rows);
  const Split split = split_rows(params.rows, params.columns, call.access.width, gpu);
  call.splits = split.splits;
  const int64_t blocks = params.rows * split.splits;
  if (blocks > kMostBlocks) return kTooManyRows;
  return launch(gpu::rescale_kernel, call, blocks, split.threads, 1, 0);
}

}  // namespace fastkd
