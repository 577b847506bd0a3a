// The CUDA kernels' entry. Nothing here waits for the device; no header of CUDA is needed to call it.
#pragma once

#include "plan.h"

namespace fastkd {

struct CudaCall {
  LossParams params;  // row_loss and gradient_scale are filled in by the call
  Reduction reduction = Reduction::mean;
  const float* num_items = nullptr;  // denominator of mean; null: the sum of the weights of the rows not ignored
  float* loss = nullptr;             // (1), or (N) for Reduction::none
  float* pending = nullptr;  // (1): what the stored gradient still has to be multiplied by, besides the upstream
  void* workspace = nullptr;
};

// The limits of a device, asked once. Returns what went wrong, or null.
const char* gpu_limits(int device, GpuLimits* limits);

Plan plan_call(const LossParams& params, const GpuLimits& gpu, std::optional<Variant> wanted = std::nullopt);
int64_t workspace_bytes(const LossParams& params, Reduction reduction, const Plan& plan);

// With a sparse teacher; params.teacher is not looked at.
Plan plan_sparse(LossParams params, const GpuLimits& gpu, std::optional<Variant> wanted = std::nullopt);
int64_t sparse_workspace_bytes(const CudaCall& call, const SparseTeacher& teacher, const Plan& plan);
const char* run_sparse_cuda(const CudaCall& call, const SparseTeacher& teacher, const Plan& plan, void* stream);

// The columns of one process: a step between two exchanges of its group.
Plan plan_shard(const LossParams& params, const GpuLimits& gpu);
int64_t shard_workspace_bytes(const ShardCall& call, const Plan& plan);
const char* run_shard_cuda(const ShardCall& call, void* workspace, const Plan& plan, void* stream);

// These enqueue on the stream and return what went wrong, or null.
const char* run_loss_cuda(const CudaCall& call, const Plan& plan, void* stream);
const char* run_rescale_cuda(const RescaleParams& params, const float* pending, const GpuLimits& gpu, void* stream);

}  // namespace fastkd
