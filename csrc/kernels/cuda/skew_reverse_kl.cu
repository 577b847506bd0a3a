#include "instances.cuh"

namespace fastkd {
KernelTable skew_reverse_kl_kernels(bool rich) { return tables_of<Divergence::skew_reverse_kl>(rich); }
}  // namespace fastkd
