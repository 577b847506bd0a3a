// The kernels of one divergence. Each divergence is compiled in a file of its own, so that a build has parallel parts.
#pragma once

#include "call.h"

namespace fastkd {

struct KernelTable {
  using Kernel = void (*)(CudaLoss);
  Kernel warp, block, sums, terms, finish;  // terms is null for a mixed divergence
};

// rich: with softcaps, label smoothing and statistics.
KernelTable forward_kl_kernels(bool rich);
KernelTable symmetric_kl_kernels(bool rich);  // reverse_kl too
KernelTable jsd_kernels(bool rich);
KernelTable total_variation_kernels(bool rich);
KernelTable skew_forward_kl_kernels(bool rich);
KernelTable skew_reverse_kl_kernels(bool rich);

// The kernels with a sparse teacher, for every divergence.
struct SparseKernels {
  using Kernel = void (*)(CudaSparse);
  Kernel prepare, resident, sums, finish;
};
SparseKernels sparse_kernels(bool rich);

}  // namespace fastkd
