// The CPU kernels' entry with a sparse teacher.
#pragma once

#include "../sparse_params.h"
#include "launch.h"

namespace fastkd {

// Checks labels, temperatures and the teacher's rows, then computes. Nothing is written unless the status is ok.
Status run_sparse_cpu(LossCall call, const SparseTeacher& teacher, const Executor& executor);

}  // namespace fastkd
