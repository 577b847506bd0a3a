#include "sparse.cuh"

#include "table.h"

namespace fastkd {
namespace {

template <bool kRich>
SparseKernels kernels_of() {
  using K = gpu::SparseKind<kRich>;
  return {gpu::sparse_prepare, gpu::sparse_resident<K>, gpu::sparse_sums<K>, gpu::sparse_finish<K>};
}

}  // namespace

SparseKernels sparse_kernels(bool rich) { return rich ? kernels_of<true>() : kernels_of<false>(); }

}  // namespace fastkd
