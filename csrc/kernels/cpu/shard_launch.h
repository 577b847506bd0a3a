// The entry of the CPU kernels for the columns of one process.
#pragma once

#include "../shard_params.h"

namespace fastkd {

// Labels and temperatures have been checked.
void run_shard_cpu(const ShardCall& call, const Executor& executor);

}  // namespace fastkd
