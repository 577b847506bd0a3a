// The CUDA implementations of torch.ops.fastkd. Nothing here waits for the device; launches go to the current stream of
// the logits' device. A label or a temperature out of range makes its row's loss and gradient NaN.
#include <cstdlib>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/launch.h"
#include "shard_arguments.h"
#include "sparse_arguments.h"

// The one symbol of a CUDA build of torch that is needed. Weak: the extension also loads where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastkd {
namespace {

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(!error, "fastkd on CUDA: ", error); }

GpuLimits limits_of(int32_t device) {
  GpuLimits limits;
  check(gpu_limits(device, &limits));
  return limits;
}

// FASTKD_CUDA_VARIANT: the kernels to take where a row fits them, for tests and measurements.
std::optional<Variant> wanted_variant() {
  const char* name = std::getenv("FASTKD_CUDA_VARIANT");
  if (!name || !*name) return std::nullopt;
  const auto variant = variant_of(name);
  STD_TORCH_CHECK(variant, "FASTKD_CUDA_VARIANT=", name, " is not known; allowed: warp, block, cluster, streaming");
  return variant;
}

struct Cuda {
  static Outputs loss(LossParams p, const Tensor& student, const Tensor& teacher, RowTensors rows, const Scalars& o) {
    return run(p, student, teacher, rows, o, [&](CudaCall& call, const GpuLimits& limits, void* stream) {
      const Plan plan = plan_call(call.params, limits, wanted_variant());
      const Tensor workspace = workspace_of(call, student, workspace_bytes(call.params, call.reduction, plan));
      return run_loss_cuda(call, plan, stream);
    });
  }

  static Outputs sparse(LossParams p, const SparseTeacher& teacher, const Tensor& student, RowTensors rows,
                        const Scalars& o) {
    return run(p, student, student, rows, o, [&](CudaCall& call, const GpuLimits& limits, void* stream) {
      const Plan plan = plan_sparse(call.params, limits, wanted_variant());
      const Tensor workspace = workspace_of(call, student, sparse_workspace_bytes(call, teacher, plan));
      return run_sparse_cuda(call, teacher, plan, stream);
    });
  }

  static void shard(const ShardCall& call, const Tensor& student) {
    const int32_t device = student.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Plan plan = plan_shard(call.params, limits_of(device));
    Tensor workspace = new_tensor(student, {shard_workspace_bytes(call, plan)}, ScalarType::Byte);
    check(run_shard_cuda(call, workspace.mutable_data_ptr(), plan, current_stream(device)));
  }

  static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
    const int32_t device = gradient.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    RescaleParams p;
    const RescaleTensors kept = fill_rescale(p, source, target, gradient, upstream, pending);
    const auto* common = static_cast<const float*>(kept.pending.const_data_ptr());
    check(run_rescale_cuda(p, common, limits_of(device), current_stream(device)));
  }

 private:
  // The call that `compute(call, limits, stream)` enqueues.
  template <class Compute>
  static Outputs run(LossParams& p, const Tensor& student, const Tensor& teacher, RowTensors& rows, const Scalars& o,
                     const Compute& compute) {
    const int32_t device = student.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    fill_params(p, student, teacher, rows, o);
    CudaCall call;
    call.reduction = parse_reduction(o.reduction);
    call.num_items = float_data(rows.num_items);
    Outputs out = new_outputs(p, student, o);
    call.loss = static_cast<float*>(out.loss.mutable_data_ptr());
    call.pending = static_cast<float*>(out.pending.mutable_data_ptr());
    call.params = p;
    check(compute(call, limits_of(device), current_stream(device)));
    return out;
  }

  static Tensor workspace_of(CudaCall& call, const Tensor& like, int64_t bytes) {
    Tensor workspace = new_tensor(like, {bytes}, ScalarType::Byte);
    call.workspace = workspace.mutable_data_ptr();
    return workspace;
  }
};

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  using Cuda = fastkd::Operators<fastkd::Cuda>;
  m.impl("kd_forward", TORCH_BOX(&Cuda::kd_forward));
  m.impl("kd_forward_", TORCH_BOX(&Cuda::kd_forward_));
  m.impl("kd_rescale", TORCH_BOX(&Cuda::kd_rescale));
  m.impl("kd_rescale_", TORCH_BOX(&Cuda::kd_rescale_));
  using Sparse = fastkd::SparseOperators<fastkd::Cuda>;
  m.impl("sparse_forward", TORCH_BOX(&Sparse::sparse_forward));
  m.impl("sparse_forward_", TORCH_BOX(&Sparse::sparse_forward_));
  using Shard = fastkd::ShardOperators<fastkd::Cuda>;
  m.impl("shard_sums", TORCH_BOX(&Shard::shard_sums));
  m.impl("shard_terms", TORCH_BOX(&Shard::shard_terms));
  m.impl("shard_gradient", TORCH_BOX(&Shard::shard_gradient));
  m.impl("shard_gradient_", TORCH_BOX(&Shard::shard_gradient_));
}
