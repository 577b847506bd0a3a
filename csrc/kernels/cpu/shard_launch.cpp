// Host side of the CPU kernels for the columns of one process: how rows meet threads.
#include "shard_launch.h"

#include "launch.h"

namespace fastkd {

void run_shard_cpu(const ShardCall& call, const Executor& executor) {
  const LossParams& p = call.params;
  const char* error = "";
  const CpuKernels& kernels = *selected_kernels(&error);
  if (p.rows == 0) return;
  if (p.gradient.data) advise_huge_pages(p);
  if (rows_are_shared(p, executor.threads)) {
    const RowScratch scratch = scratch_of_thread(p.columns);
    for (int64_t n = 0; n < p.rows; ++n) kernels.shard_row(call, n, scratch, &executor);
    return;
  }
  struct Context {
    const ShardCall& call;
    const CpuKernels& kernels;
  } context{call, kernels};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    const auto& [own, table] = *static_cast<Context*>(c);
    const RowScratch scratch = scratch_of_thread(own.params.columns);
    for (int64_t n = begin; n < end; ++n) table.shard_row(own, n, scratch, nullptr);
  };
  executor.run(p.rows, serial_rows(p.columns), body, &context);
}

}  // namespace fastkd
