// Stands in for the kernels that a build leaves out: tables without a kernel.
#include "../../../csrc/kernels/cuda/table.h"

namespace fastkd {
#define LEFT_OUT(name) \
  __attribute__((weak)) KernelTable name(bool) { return {}; }
LEFT_OUT(forward_kl_kernels)
LEFT_OUT(symmetric_kl_kernels)
LEFT_OUT(jsd_kernels)
LEFT_OUT(total_variation_kernels)
LEFT_OUT(skew_forward_kl_kernels)
LEFT_OUT(skew_reverse_kl_kernels)
__attribute__((weak)) SparseKernels sparse_kernels(bool) { return {}; }
}  // namespace fastkd
