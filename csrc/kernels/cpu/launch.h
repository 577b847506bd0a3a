// The CPU kernels' entry: one call of the loss, and the rescaling of a stored gradient.
#pragma once

#include "isa.h"

namespace fastkd {

struct LossCall {
  LossParams params;  // row_loss and gradient_scale are filled in by the call
  Reduction reduction = Reduction::mean;
  const float* num_items = nullptr;  // denominator of mean; null: the sum of the weights of the rows not ignored
  float* loss = nullptr;             // (1), or (N) for Reduction::none
  float* pending_scale = nullptr;  // (1): what the stored gradient still has to be multiplied by, besides the upstream
};

// What computes the rows of a call.
struct RowRunner {
  void (*run)(const void* context, const LossParams&, const CpuKernels&, const Executor&);
  const void* context = nullptr;
};

// Labels in the vocabulary, temperatures finite and above 0, at the rows that are not ignored.
Status check_values(const LossParams& params);

// A call but its rows: the denominator, where the row losses go, their sum in row order.
void run_call_cpu(LossCall call, const RowRunner& rows, const Executor& executor);

// Whether threads should share each row instead of taking rows of their own: in blocks of the busiest thread's work.
bool rows_are_shared(const LossParams& params, int threads);

// Memory of a row on the calling thread, kept between calls.
RowScratch scratch_of_thread(int64_t columns);

// For a fresh gradient, which is first touched by the threads that write it.
void advise_huge_pages(const LossParams& params);

// Rows below which waking a second thread costs more than it saves.
int64_t serial_rows(int64_t columns);

// Checks labels and temperatures, then computes. Nothing is written unless the status is ok.
Status run_loss_cpu(LossCall call, const Executor& executor);

// The kernel of the instruction set in use that `kKernel` names, over [0, n) items of so many rows each.
template <class Params, void (*CpuKernels::*kKernel)(const Params&, int64_t begin, int64_t end)>
void run_over(int64_t n, int64_t rows_each, const Params& params, const Executor& executor) {
  struct Context {
    const Params& params;
    const CpuKernels& kernels;
  };
  const char* error = "";
  Context context{params, *selected_kernels(&error)};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    const auto& [own, table] = *static_cast<Context*>(c);
    (table.*kKernel)(own, begin, end);
  };
  if (n > 0 && params.columns > 0) executor.run(n, serial_rows(rows_each * params.columns), body, &context);
}

void run_rescale_cpu(const RescaleParams& params, const Executor& executor);

}  // namespace fastkd
