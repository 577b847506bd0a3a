#include "instances.cuh"

namespace fastkd {
KernelTable skew_forward_kl_kernels(bool rich) { return tables_of<Divergence::skew_forward_kl>(rich); }
}  // namespace fastkd
