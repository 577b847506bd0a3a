// Host side of the CUDA kernels: limits of the device, workspace, launches.
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "batch.cuh"
#include "table.h"

namespace fastkd {
namespace {

constexpr int kOneBlock = 1024;  // threads of the kernels that have one block
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kAlignment = 16;

const char* message(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

template <class Params>
cudaError_t launch(void (*kernel)(Params), Params params, int64_t blocks, int threads, int cluster, int shared_bytes,
                   cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  if (cluster > 8) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

KernelTable kernels_for(const LossParams& p) {
  const bool rich =
      p.student_softcap != 0 || p.teacher_softcap != 0 || p.stats || (p.needs_hard() && p.options.label_smoothing != 0);
  switch (p.options.divergence) {
    case Divergence::forward_kl: return forward_kl_kernels(rich);
    case Divergence::jsd: return jsd_kernels(rich);
    case Divergence::total_variation: return total_variation_kernels(rich);
    case Divergence::skew_forward_kl: return skew_forward_kl_kernels(rich);
    case Divergence::skew_reverse_kl: return skew_reverse_kl_kernels(rich);
    default: return symmetric_kl_kernels(rich);
  }
}

// The parts of a call's workspace, one behind the other.
struct Workspace {
  CallScales* scales;
  float *row_loss, *label_logits;
  Piece* pieces;
  TermSums* terms;
  int64_t bytes = 0;

  Workspace(char* memory, int64_t rows, Reduction reduction, const Plan& plan) {
    const int64_t parts = plan.variant == Variant::streaming ? rows * plan.splits : 0;
    scales = take<CallScales>(memory, 1);
    row_loss = take<float>(memory, reduction == Reduction::none ? 0 : rows);
    label_logits = take<float>(memory, parts > 0 ? rows : 0);
    pieces = take<Piece>(memory, parts);
    terms = take<TermSums>(memory, parts);
  }

 private:
  template <class T>
  T* take(char* memory, int64_t count) {
    T* const at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
};

cudaError_t launch_rows(const CudaLoss& call, const Plan& plan, cudaStream_t stream) {
  const KernelTable kernels = kernels_for(call.loss);
  if (plan.variant != Variant::streaming) {
    const KernelTable::Kernel kernel = plan.variant == Variant::warp ? kernels.warp : kernels.block;
    return launch(kernel, call, plan.blocks, plan.threads, plan.cluster, plan.shared_bytes, stream);
  }
  const int64_t blocks = call.loss.rows * plan.splits;
  cudaError_t status = launch(kernels.sums, call, blocks, plan.threads, 1, plan.shared_bytes, stream);
  if (status == cudaSuccess && kernels.terms)
    status = launch(kernels.terms, call, blocks, plan.threads, 1, plan.shared_bytes, stream);
  if (status != cudaSuccess) return status;
  return launch(kernels.finish, call, plan.blocks, plan.threads, 1, plan.shared_bytes, stream);
}

// 16 where the device forms clusters of 16 blocks that fill half a multiprocessor each, else what every device can.
int largest_cluster(const cudaDeviceProp& device) {
  if (device.major < 9) return 1;
  const void* kernel = reinterpret_cast<const void*>(forward_kl_kernels(false).block);
  const int shared = static_cast<int>(device.sharedMemPerMultiprocessor / 2) - 1024;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  int blocks = 0;
  const bool known = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess &&
                     cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                     cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config) == cudaSuccess;
  if (!known) (void)cudaGetLastError();  // a refusal must not be found by the next call
  return known && blocks >= 16 ? 16 : 8;
}

struct Device {
  GpuLimits limits;
  std::string error;

  explicit Device(int index) {
    cudaDeviceProp device{};
    const cudaError_t status = cudaGetDeviceProperties(&device, index);
    if (status != cudaSuccess) {
      error = cudaGetErrorString(status);
      return;
    }
    limits.arch = 10 * device.major + device.minor;
    limits.multiprocessors = device.multiProcessorCount;
    limits.shared_per_block = static_cast<int>(device.sharedMemPerBlockOptin);
    limits.shared_per_multiprocessor = static_cast<int>(device.sharedMemPerMultiprocessor);
    limits.largest_cluster = largest_cluster(device);
  }
};

}  // namespace

const char* gpu_limits(int device, GpuLimits* limits) {
  static std::mutex mutex;
  static std::vector<Device*> known;  // never freed: a device's limits do not change
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= known.size()) known.resize(static_cast<size_t>(device) + 1);
  Device*& entry = known[static_cast<size_t>(device)];
  if (!entry) entry = new Device(device);
  *limits = entry->limits;
  return entry->error.empty() ? nullptr : entry->error.c_str();
}

Plan plan_call(const LossParams& p, const GpuLimits& gpu) {
  const Access access = access_of(p.student, p.teacher, p.gradient, p.rows);
  const Problem problem{p.rows,
                        p.columns,
                        p.student.dtype,
                        p.teacher.dtype,
                        is_mixed_kl(p.options.divergence),
                        p.gradient.data != nullptr,
                        access.vectors};
  return plan_loss(problem, gpu);
}

int64_t workspace_bytes(const LossParams& params, Reduction reduction, const Plan& plan) {
  return Workspace(nullptr, params.rows, reduction, plan).bytes;
}

const char* run_loss_cuda(const CudaCall& c, const Plan& plan, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Workspace space(static_cast<char*>(c.workspace), c.params.rows, c.reduction, plan);
  CudaLoss call;
  call.loss = c.params;
  call.loss.row_loss = c.reduction == Reduction::none ? c.loss : space.row_loss;
  call.access = plan.access;
  call.scales = space.scales;
  call.team_bytes = plan.team_bytes;
  call.team_chunks = plan.team_chunks;
  call.splits = plan.splits;
  call.pieces = space.pieces;
  call.terms = space.terms;
  call.label_logits = space.label_logits;
  call.total = c.reduction == Reduction::none ? nullptr : c.loss;
  if (plan.blocks > kMostBlocks || c.params.rows * plan.splits > kMostBlocks)
    return "more rows than one launch can have blocks (2^31 - 1)";

  const CudaScales scales{call.loss, c.reduction, c.num_items, space.scales, c.pending};
  constexpr int kShared = kOneBlock / gpu::kWarp * static_cast<int>(sizeof(double));
  cudaError_t status = launch(gpu::scales_kernel, scales, 1, kOneBlock, 1, kShared, stream);
  if (status == cudaSuccess && c.params.rows > 0) status = launch_rows(call, plan, stream);
  if (status == cudaSuccess && call.total) status = launch(gpu::total_kernel, call, 1, kOneBlock, 1, kShared, stream);
  return message(status);
}

const char* run_rescale_cuda(const RescaleParams& params, const float* pending, const GpuLimits& gpu, void* stream) {
  if (params.rows == 0) return nullptr;
  CudaRescale call;
  call.rescale = params;
  call.pending = pending;
  call.access = access_of(params.source, params.source, params.gradient, params.rows);
  const Split split = split_rows(params.rows, params.columns, call.access.width, gpu);
  call.splits = split.splits;
  const int64_t blocks = params.rows * split.splits;
  if (blocks > kMostBlocks) return "more rows than one launch can have blocks (2^31 - 1)";
  return message(launch(gpu::rescale_kernel, call, blocks, split.threads, 1, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastkd
