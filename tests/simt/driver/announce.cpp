// The kernels of fastkd, announced to the driver.
#include "../../../csrc/kernels/cuda/batch.cuh"
#include "../../../csrc/kernels/cuda/table.h"
#include "driver.h"

namespace simt {

using namespace fastkd;

void announce_kernels(const std::map<std::string, int>& bounds) {
  const auto all = [&](const std::string& name, KernelTable (*tables)(bool)) {
    for (const bool rich : {false, true}) {
      const KernelTable table = tables(rich);
      const std::string full = name + (rich ? ".rich" : "");
      const auto add = [&](const char* member, KernelTable::Kernel kernel, const char* in_source) {
        const int of_kind =
            rich ? gpu::Kind<Divergence::jsd, true>::kMostThreads : gpu::Kind<Divergence::jsd, false>::kMostThreads;
        const int bound = bounds.at(in_source) ? bounds.at(in_source) : of_kind;
        if (kernel) driver.announce(full + "." + member, kernel, bound);
      };
      add("warp", table.warp, "warp_resident");
      add("block", table.block, "block_resident");
      add("sums", table.sums, "stream_sums");
      add("terms", table.terms, "stream_terms");
      add("finish", table.finish, "stream_finish");
    }
  };
  all("forward_kl", forward_kl_kernels);
  all("symmetric_kl", symmetric_kl_kernels);
  all("jsd", jsd_kernels);
  all("total_variation", total_variation_kernels);
  all("skew_forward_kl", skew_forward_kl_kernels);
  all("skew_reverse_kl", skew_reverse_kl_kernels);
  driver.announce("scales", gpu::scales_kernel, bounds.at("scales_kernel"));
  driver.announce("total", gpu::total_kernel, bounds.at("total_kernel"));
  driver.announce("rescale", gpu::rescale_kernel, bounds.at("rescale_kernel"));
}

}  // namespace simt
