// Host side of the CPU kernels: value checks, the denominator, scratch memory, and how rows meet threads.
#include "launch.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {
namespace {

constexpr int64_t kAlignment = 64;  // bytes: one cache line, one AVX-512 vector
constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kSerialColumns = 16384;  // work below which waking a second thread costs more than it saves
constexpr int64_t kSharedRowCost = 12;     // blocks that one thread does while a shared row's steps synchronise
constexpr int64_t kLongPart = 192;         // blocks of a shared row's part that miss so much less than a whole row's

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch of one thread, kept between calls: a fresh megabyte a call would be page faults every time.
class ThreadScratch {
 public:
  RowScratch for_columns(int64_t columns) {
    const int64_t blocks = blocks_of(columns);
    const int64_t width = blocks * kBlock + static_cast<int64_t>(kPage / sizeof(float));
    const int64_t floats = 4 * width * static_cast<int64_t>(sizeof(float));
    const int64_t pieces = blocks * static_cast<int64_t>(sizeof(Piece));
    const int64_t bytes = floats + pieces + blocks * static_cast<int64_t>(sizeof(TermSums) + sizeof(bool));
    if (bytes > capacity_) {
      capacity_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(capacity_)));
      if (!memory_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    float* exponentials = static_cast<float*>(memory_.get());
    char* rest = static_cast<char*>(memory_.get()) + floats;
    return {exponentials,
            exponentials + width,
            exponentials + 2 * width,
            exponentials + 3 * width,
            reinterpret_cast<Piece*>(rest),
            reinterpret_cast<TermSums*>(rest + pieces),
            reinterpret_cast<bool*>(rest + pieces + blocks * static_cast<int64_t>(sizeof(TermSums)))};
  }

 private:
  std::unique_ptr<void, Free> memory_;
  int64_t capacity_ = 0;
};

thread_local ThreadScratch thread_scratch;

}  // namespace

RowScratch scratch_of_thread(int64_t columns) { return thread_scratch.for_columns(columns); }

Status check_values(const LossParams& p) {
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.ignored(n)) continue;
    if (p.labels && (p.labels[n] < 0 || p.labels[n] >= p.columns)) return {Status::label_out_of_range, n};
    if (p.temperatures && !(p.temperatures[n] > 0 && std::isfinite(p.temperatures[n]))) {
      return {Status::bad_temperature, n};
    }
  }
  return {};
}

namespace {

// 1 / denominator of the mean; a denominator of 0 (no token) leaves the sum, which is 0, as it is.
double normaliser(const LossCall& call) {
  if (call.reduction != Reduction::mean) return 1;
  double denominator = 0;
  if (call.num_items) {
    denominator = *call.num_items;
  } else {
    for (int64_t n = 0; n < call.params.rows; ++n)
      if (!call.params.ignored(n)) denominator += call.params.weight(n);
  }
  return denominator == 0 ? 1 : 1 / denominator;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// A fresh gradient is first touched by the threads that write it; most of its cost would be 4 KiB page faults.
void advise_huge_pages(const LossParams& p) {
#if defined(__linux__)
  const int64_t bytes = p.rows * p.gradient_columns * size_of(p.gradient.dtype);
  if (!p.fresh_gradient || bytes < 2 * kHugePage) return;
  const auto begin = (reinterpret_cast<uintptr_t>(p.gradient.data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end =
      (reinterpret_cast<uintptr_t>(p.gradient.data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#else
  (void)p;
#endif
}

int64_t serial_rows(int64_t columns) { return divide_up(kSerialColumns, columns); }

bool rows_are_shared(const LossParams& p, int threads) {
  if (threads <= 1 || p.rows * p.columns < kSerialColumns) return false;
  const int64_t blocks = blocks_of(p.columns);
  const int64_t own = divide_up(p.rows, threads) * blocks;
  const int64_t shared = p.rows * (divide_up(blocks, threads) + kSharedRowCost);
  return shared < own || (p.gradient.data && blocks >= kLongPart * threads);
}

namespace {

void compute_rows(const void*, const LossParams& p, const CpuKernels& kernels, const Executor& executor) {
  if (rows_are_shared(p, executor.threads)) {
    const RowScratch scratch = thread_scratch.for_columns(p.columns);
    for (int64_t n = 0; n < p.rows; ++n) kernels.shared_row(p, n, scratch, executor);
    return;
  }
  struct Context {
    const LossParams& params;
    const CpuKernels& kernels;
  } context{p, kernels};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    const auto& [params, table] = *static_cast<Context*>(c);
    table.rows(params, begin, end, thread_scratch.for_columns(params.columns));
  };
  executor.run(p.rows, serial_rows(p.columns), body, &context);
}

}  // namespace

void run_call_cpu(LossCall call, const RowRunner& rows, const Executor& executor) {
  LossParams& p = call.params;
  const double normalise = normaliser(call);
  // fp16 keeps the gradient of the sum: (q - p) / N would underflow before a loss scaler could save it
  const bool store_normalised = p.gradient.dtype != DType::float16;
  p.gradient_scale = store_normalised ? static_cast<float>(normalise) : 1.0f;
  *call.pending_scale = store_normalised ? 1.0f : static_cast<float>(normalise);

  std::vector<float> row_loss;
  if (call.reduction != Reduction::none) row_loss.resize(static_cast<size_t>(p.rows));
  p.row_loss = call.reduction == Reduction::none ? call.loss : row_loss.data();
  const char* error = "";
  if (p.rows > 0) {
    advise_huge_pages(p);
    rows.run(rows.context, p, *selected_kernels(&error), executor);
  }
  if (call.reduction == Reduction::none) return;
  double total = 0;  // in row order: the same bits whoever computed the rows
  for (const float loss : row_loss) total += loss;
  *call.loss = static_cast<float>(total * normalise);
}

Status run_loss_cpu(LossCall call, const Executor& executor) {
  const Status status = check_values(call.params);
  if (status.code == Status::ok) run_call_cpu(call, {compute_rows}, executor);
  return status;
}

void run_rescale_cpu(const RescaleParams& p, const Executor& executor) {
  run_over<RescaleParams, &CpuKernels::rescale>(p.rows, 1, p, executor);
}

}  // namespace fastkd
