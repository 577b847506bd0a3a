#include "driver.h"

namespace simt {

Driver driver;

void Driver::reset() {
  launches.clear();
  last_error = cudaSuccess;
  for (auto& known : kernels) known.second.shared_bytes = 48 * 1024, known.second.any_cluster = false;
}

bool Driver::ok() const {
  for (const Launch& launch : launches) {
    if (!launch.report.ok()) return false;
  }
  return last_error == cudaSuccess;
}

std::string Driver::text() const {
  std::string all;
  for (const Launch& launch : launches) {
    for (const Error& error : launch.report.errors)
      all += launch.kernel + ": " + error.check + ": " + error.text + "\n";
  }
  return all;
}

namespace {

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) driver.last_error = error;
  return error;
}

int cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    if (config.attrs[k].id == cudaLaunchAttributeClusterDimension)
      return static_cast<int>(config.attrs[k].val.clusterDim.x);
  }
  return 1;
}

// What a device of these properties refuses.
cudaError_t refusal(const Driver::Kernel& kernel, const cudaLaunchConfig_t& config) {
  const auto shared = static_cast<size_t>(kernel.shared_bytes);
  if (config.dynamicSmemBytes > shared) return cudaErrorInvalidValue;
  if (config.blockDim.x > static_cast<unsigned>(kernel.most_threads)) return cudaErrorInvalidConfiguration;
  const int cluster = cluster_of(config);
  if (cluster > (kernel.any_cluster ? driver.largest_cluster : 8)) return cudaErrorInvalidConfiguration;
  if (cluster > 1 && driver.properties.major < 9) return cudaErrorInvalidConfiguration;
  const bool flat = config.gridDim.y * config.gridDim.z * config.blockDim.y * config.blockDim.z == 1;
  return flat ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace
}  // namespace simt

using simt::driver;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "unspecified launch failure";
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = driver.last_error;
  driver.last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return simt::result(cudaErrorInvalidDevice);
  *properties = driver.properties;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const auto known = driver.kernels.find(kernel);
  if (known == driver.kernels.end()) return simt::result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    known->second.any_cluster = value != 0;
    return cudaSuccess;
  }
  if (static_cast<size_t>(value) > driver.properties.sharedMemPerBlockOptin) return simt::result(cudaErrorInvalidValue);
  known->second.shared_bytes = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* kernel, const cudaLaunchConfig_t* config) {
  const auto known = driver.kernels.find(kernel);
  if (known == driver.kernels.end()) return simt::result(cudaErrorInvalidDeviceFunction);
  if (config->dynamicSmemBytes > static_cast<size_t>(known->second.shared_bytes)) {
    return simt::result(cudaErrorInvalidValue);
  }
  *blocks = known->second.any_cluster ? driver.largest_cluster : 8;
  return cudaSuccess;
}

// Runs to its end before it returns: a stream of one call at a time.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (driver.last_error != cudaSuccess) return driver.last_error;  // what follows a failure is not run
  const auto known = driver.kernels.find(kernel);
  if (known == driver.kernels.end()) return simt::result(cudaErrorInvalidDeviceFunction);
  const cudaError_t refused = simt::refusal(known->second, *config);
  if (refused != cudaSuccess) return simt::result(refused);
  simt::Launch launch;
  launch.kernel = known->second.name;
  launch.config.grid = config->gridDim.x;
  launch.config.cluster = simt::cluster_of(*config);
  launch.config.threads = static_cast<int>(config->blockDim.x);
  launch.config.shared_bytes = config->dynamicSmemBytes;
  launch.config.seed = driver.seed;
  launch.report = simt::launch(launch.config, *driver.memory, [&] { known->second.call(arguments); });
  for (const auto& buffer : driver.memory->buffers()) launch.buffers[buffer->name] = buffer->counters;
  driver.launches.push_back(launch);
  return launch.report.ok() ? cudaSuccess : simt::result(cudaErrorLaunchFailure);
}
