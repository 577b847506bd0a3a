// The CUDA implementations of torch.ops.fastkd. Nothing here waits for the device; launches go to the current stream of
// the logits' device. A label or a temperature out of range makes its row's loss and gradient NaN.
#include <cstdlib>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/launch.h"
#include "arguments.h"

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
    const Plan plan = plan_call(p, limits_of(device), wanted_variant());
    const Tensor workspace = new_tensor(student, {workspace_bytes(p, call.reduction, plan)}, ScalarType::Byte);
    call.workspace = const_cast<void*>(workspace.const_data_ptr());
    check(run_loss_cuda(call, plan, current_stream(device)));
    return out;
  }

  static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
    const int32_t device = gradient.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    RescaleParams p;
    const RescaleTensors kept = fill_rescale(p, source, target, gradient, upstream, pending);
    const auto* common = static_cast<const float*>(kept.pending.const_data_ptr());
    check(run_rescale_cuda(p, common, limits_of(device), current_stream(device)));
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
}
