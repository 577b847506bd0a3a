#include "instances.cuh"

namespace fastkd {
KernelTable total_variation_kernels(bool rich) { return tables_of<Divergence::total_variation>(rich); }
}  // namespace fastkd
