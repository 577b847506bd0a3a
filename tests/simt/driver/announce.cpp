// The kernels of fastkd, announced to the driver with the launch bounds that stand before them in the source:
// simt_bounds.h, made by simt_build.py, has BOUND_<kernel> for each.
#include <simt_bounds.h>

#include "../../../csrc/kernels/cuda/batch.cuh"
#include "../../../csrc/kernels/cuda/shard.cuh"
#include "../../../csrc/kernels/cuda/sparse.cuh"
#include "../../../csrc/kernels/cuda/table.h"
#include "driver.h"

namespace simt {

using namespace fastkd;
using namespace fastkd::gpu;

namespace {

template <class K>
void announce_table(const std::string& name, const KernelTable& table) {
  const auto add = [&](const char* member, KernelTable::Kernel kernel, int most_threads) {
    if (kernel) driver.announce(name + member, kernel, most_threads);
  };
  add(".warp", table.warp, BOUND_warp_resident);
  add(".block", table.block, BOUND_block_resident);
  add(".sums", table.sums, BOUND_stream_sums);
  add(".terms", table.terms, BOUND_stream_terms);
  add(".finish", table.finish, BOUND_stream_finish);
}

template <Divergence kDivergence>
void announce_divergence(const std::string& name, KernelTable (*tables)(bool)) {
  announce_table<Kind<kDivergence, false>>(name, tables(false));
  announce_table<Kind<kDivergence, true>>(name + ".rich", tables(true));
}

template <class K>
void announce_sparse(const std::string& name, const SparseKernels& kernels) {
  if (!kernels.prepare) return;
  driver.announce("sparse.prepare", kernels.prepare, BOUND_sparse_prepare);
  driver.announce(name + ".resident", kernels.resident, BOUND_sparse_resident);
  driver.announce(name + ".sums", kernels.sums, BOUND_sparse_sums);
  driver.announce(name + ".finish", kernels.finish, BOUND_sparse_finish);
}

}  // namespace

void announce_kernels() {
  announce_divergence<Divergence::forward_kl>("forward_kl", forward_kl_kernels);
  announce_divergence<Divergence::symmetric_kl>("symmetric_kl", symmetric_kl_kernels);
  announce_divergence<Divergence::jsd>("jsd", jsd_kernels);
  announce_divergence<Divergence::total_variation>("total_variation", total_variation_kernels);
  announce_divergence<Divergence::skew_forward_kl>("skew_forward_kl", skew_forward_kl_kernels);
  announce_divergence<Divergence::skew_reverse_kl>("skew_reverse_kl", skew_reverse_kl_kernels);
  announce_sparse<SparseKind<false>>("sparse", sparse_kernels(false));
  announce_sparse<SparseKind<true>>("sparse.rich", sparse_kernels(true));
  driver.announce("scales", scales_kernel, BOUND_scales_kernel);
  driver.announce("total", total_kernel, BOUND_total_kernel);
  driver.announce("shard.gather", shard_gather, BOUND_shard_gather);
  driver.announce("shard.spread", shard_spread, BOUND_shard_spread);
  driver.announce("rescale", rescale_kernel, BOUND_rescale_kernel);
}

}  // namespace simt
