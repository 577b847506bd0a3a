#include "instances.cuh"

namespace fastkd {
KernelTable jsd_kernels(bool rich) { return tables_of<Divergence::jsd>(rich); }
}  // namespace fastkd
