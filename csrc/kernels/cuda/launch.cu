// The CUDA runtime's part of a call: limits of the device, launches.
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "shard_sequence.h"
#include "sparse_sequence.h"

namespace fastkd {
namespace {

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

struct Launch {
  cudaStream_t stream;

  template <class Params>
  const char* operator()(void (*kernel)(Params), const Params& params, int64_t blocks, int threads, int cluster,
                         int shared_bytes) const {
    return message(launch(kernel, params, blocks, threads, cluster, shared_bytes, stream));
  }
};

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

int64_t workspace_bytes(const LossParams& params, Reduction reduction, const Plan& plan) {
  return Workspace(nullptr, params.rows, reduction, plan).space.bytes;
}

const char* run_loss_cuda(const CudaCall& call, const Plan& plan, void* stream) {
  return enqueue_loss(call, plan, Launch{static_cast<cudaStream_t>(stream)});
}

int64_t sparse_workspace_bytes(const CudaCall& call, const SparseTeacher& teacher, const Plan& plan) {
  return SparseWorkspace(call, teacher, plan).space.bytes;
}

const char* run_sparse_cuda(const CudaCall& call, const SparseTeacher& teacher, const Plan& plan, void* stream) {
  return enqueue_sparse(call, teacher, plan, Launch{static_cast<cudaStream_t>(stream)});
}

int64_t shard_workspace_bytes(const ShardCall& call, const Plan& plan) {
  return ShardWorkspace(nullptr, call, plan).space.bytes;
}

const char* run_shard_cuda(const ShardCall& call, void* workspace, const Plan& plan, void* stream) {
  return enqueue_shard(call, workspace, plan, Launch{static_cast<cudaStream_t>(stream)});
}

const char* run_rescale_cuda(const RescaleParams& params, const float* pending, const GpuLimits& gpu, void* stream) {
  return enqueue_rescale(params, pending, gpu, Launch{static_cast<cudaStream_t>(stream)});
}

}  // namespace fastkd
