// The few numbers of a whole call, by one block each, and the rescaling of a stored gradient.
#pragma once

#include "streaming.cuh"

namespace fastkd {
namespace gpu {

// The sum of the threads' numbers in thread 0; shared: one number a warp.
FASTKD_DEVICE double sum_block(double x, double* shared) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  const int warps = block_threads() / kWarp, warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  if (lane == 0) shared_store(shared + warp, x);
  block_sync();
  if (warp != 0) return 0;
  x = lane < warps ? shared_load(shared + lane) : 0.0;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  return x;
}

// 1 / denominator of the mean; a denominator of 0 (no token) leaves the sum, which is 0, as it is.
FASTKD_KERNEL(kOneBlockThreads, 1) scales_kernel(FASTKD_CONSTANT CudaScales call) {
  const LossParams& p = call.loss;
  double denominator = 1;
  if (call.reduction == Reduction::mean && !call.num_items) {
    double sum = 0;
    for (int64_t n = thread_index(); n < p.rows; n += block_threads()) {
      if (p.labels && load(p.labels + n) == p.ignore_index) continue;
      sum += p.token_weights ? load(p.token_weights + n) : 1.0f;
    }
    denominator = sum_block(sum, reinterpret_cast<double*>(shared_memory()));
  } else if (call.reduction == Reduction::mean) {
    denominator = load(call.num_items);
  }
  if (thread_index() != 0) return;
  // fp16 keeps the gradient of the sum: (q - p) / N would underflow before a loss scaler could save it
  const double normaliser = denominator == 0 ? 1 : 1 / denominator;
  const bool stored = p.student.dtype != DType::float16;
  store(call.scales, CallScales{normaliser, stored ? static_cast<float>(normaliser) : 1.0f});
  store(call.pending, stored ? 1.0f : static_cast<float>(normaliser));
}

FASTKD_KERNEL(kOneBlockThreads, 1) total_kernel(FASTKD_CONSTANT CudaLoss call) {
  double sum = 0;
  for (int64_t n = thread_index(); n < call.loss.rows; n += block_threads()) sum += load(call.loss.row_loss + n);
  sum = sum_block(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() == 0) store(call.total, static_cast<float>(sum * load(&call.scales->normaliser)));
}

// Row n of the gradient times its upstream and what is pending. Where that is 1 and the row stays where it is, it is
// not touched: an ordinary backward costs no sweep, and the host need not know.
FASTKD_KERNEL(kStreamThreads, 3) rescale_kernel(FASTKD_CONSTANT CudaRescale call) {
  const RescaleParams& p = call.rescale;
  const int64_t n = block_index() / call.splits;
  const float factor = load(p.factor + n * p.factor_stride) * load(call.pending);
  if (factor == 1 && p.source.data == p.gradient.data) return;
  LossParams rows;
  rows.columns = p.columns;
  rows.student = rows.teacher = p.source;
  rows.gradient = p.gradient;
  const RowView view(rows, call.access, n, block_threads());
  const Team team{thread_index(), block_threads(), static_cast<int>(block_index() % call.splits), call.splits};
  stream<false>(view, team, [&](const Chunk& c, const Place& at) {
    Vector stored{};
    for (int q = 0; 4 * q < at.n; ++q) {
      Quad x = unpack(c.student, view.student_dtype, q);
      for (int i = 0; i < 4; ++i) x.value[i] *= factor;
      view.put(stored, x, q);
    }
    view.store_gradient(at, stored);
  });
}

}  // namespace gpu
}  // namespace fastkd
