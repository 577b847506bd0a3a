// The CPU kernels of the linear loss: see products.h.
#pragma once

#include "isa.h"

namespace fastkd {

void run_add_cpu(const AddParams& params, const Executor& executor);
void run_turn_cpu(const TurnParams& params, const Executor& executor);

}  // namespace fastkd
