#include "instances.cuh"

namespace fastkd {
KernelTable forward_kl_kernels(bool rich) { return tables_of<Divergence::forward_kl>(rich); }
}  // namespace fastkd
