// The device behind cuda_runtime.h: which kernels it knows, what it may take, what it launched.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../engine.h"

namespace simt {

struct Launch {
  std::string kernel;
  Config config;
  Report report;
  std::map<std::string, Counters> buffers;  // what went through each
};

struct Driver {
  cudaDeviceProp properties = {9, 0, 132, 227 * 1024, 228 * 1024};
  int largest_cluster = 16;
  uint64_t seed = 0;
  Memory* memory = nullptr;  // global memory of the present call
  std::vector<Launch> launches;
  cudaError_t last_error = cudaSuccess;

  struct Kernel {
    std::string name;
    std::function<void(void**)> call;
    int most_threads = kMaxThreads;  // its launch bound
    int shared_bytes = 48 * 1024;    // until more is asked for
    bool any_cluster = false;        // more than 8 blocks
  };
  std::map<const void*, Kernel> kernels;

  // Nothing can be launched that was not announced: the machine must know the type of its argument.
  template <class Params>
  void announce(const std::string& name, void (*kernel)(Params), int most_threads) {
    Kernel& known = kernels[reinterpret_cast<const void*>(kernel)];
    known.name = name;
    known.most_threads = most_threads;
    known.call = [kernel](void** arguments) { kernel(*static_cast<Params*>(arguments[0])); };
  }
  // A new call begins: nothing was launched, no kernel was asked for more than any may have.
  void reset();
  bool ok() const;
  std::string text() const;
};

extern Driver driver;

void announce_kernels();  // all of fastkd that are linked

}  // namespace simt
