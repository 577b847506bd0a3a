// The CPU kernels' entry: one call of the loss, and the rescaling of a stored gradient.
#pragma once

#include "../params.h"

namespace fastkd {

struct LossCall {
  LossParams params;  // row_loss and gradient_scale are filled in by the call
  Reduction reduction = Reduction::mean;
  const float* num_items = nullptr;  // denominator of mean; null: the sum of the weights of the rows not ignored
  float* loss = nullptr;             // (1), or (N) for Reduction::none
  float* pending_scale = nullptr;  // (1): what the stored gradient still has to be multiplied by, besides the upstream
};

// Checks labels and temperatures, then computes. Nothing is written unless the status is ok.
Status run_loss_cpu(LossCall call, const Executor& executor);

void run_rescale_cpu(const RescaleParams& params, const Executor& executor);

}  // namespace fastkd
