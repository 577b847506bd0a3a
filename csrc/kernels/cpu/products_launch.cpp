// Host side of the CPU kernels of the linear loss: how rows meet threads.
#include "products_launch.h"

#include "launch.h"

namespace fastkd {

void run_add_cpu(const AddParams& p, const Executor& executor) {
  run_over<AddParams, &CpuKernels::add>(p.rows, 1, p, executor);
}

void run_turn_cpu(const TurnParams& p, const Executor& executor) {
  const int64_t tiles = (p.rows + kTurnedRows - 1) / kTurnedRows;
  run_over<TurnParams, &CpuKernels::turn>(tiles, kTurnedRows, p, executor);
}

}  // namespace fastkd
