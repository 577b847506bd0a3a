// Which instruction set runs: read from the processor, or forced by the environment.
#include <cstdlib>
#include <string>

#include "isa.h"

namespace fastkd {
namespace {

bool runs_here(const CpuKernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx2Kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (&kernels == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return &kernels == &kBaselineKernels;
}

#if defined(__x86_64__)
constexpr const CpuKernels* kAll[] = {&kBaselineKernels, &kAvx2Kernels, &kAvx512Kernels};
#else
constexpr const CpuKernels* kAll[] = {&kBaselineKernels};
#endif

struct Selection {
  const CpuKernels* kernels = nullptr;
  std::string runnable, error;

  Selection() {
    const char* forced = std::getenv("FASTKD_CPU_ISA");
    const bool is_forced = forced && *forced;
    for (const CpuKernels* candidate : kAll) {
      if (!runs_here(*candidate)) continue;
      runnable += (runnable.empty() ? "" : ", ") + std::string(candidate->name);
      if (!is_forced || std::string(forced) == candidate->name) kernels = candidate;
    }
    if (!kernels)
      error = "FASTKD_CPU_ISA=" + std::string(forced) + " does not run on this machine; available: " + runnable;
  }
};

const Selection& selection() {
  static const Selection once;
  return once;
}

}  // namespace

const CpuKernels* selected_kernels(const char** error) {
  *error = selection().error.c_str();
  return selection().kernels;
}

const char* runnable_isas() { return selection().runnable.c_str(); }

}  // namespace fastkd
