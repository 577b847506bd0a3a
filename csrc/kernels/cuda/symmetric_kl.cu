#include "instances.cuh"

namespace fastkd {
KernelTable symmetric_kl_kernels(bool rich) { return tables_of<Divergence::symmetric_kl>(rich); }
}  // namespace fastkd
