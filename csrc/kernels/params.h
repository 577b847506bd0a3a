// One call of the loss, as the kernels see it: raw pointers, strides in elements, options. No torch.
#pragma once

#include <cstdint>

#include "../core/finish.h"

namespace fastkd {

enum class DType { float32, bfloat16, float16 };

FASTKD_FN constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Rows of unit column stride, addressed on two levels, so that logits[:, :-1] of a batch needs no copy.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t inner = 1;                           // rows per outer step, >= 1
  int64_t outer_stride = 0, inner_stride = 0;  // elements

  FASTKD_METHOD char* row(int64_t n) const {
    const int64_t offset = (n / inner) * outer_stride + (n % inner) * inner_stride;
    return static_cast<char*>(data) + offset * size_of(dtype);
  }
};

enum class Reduction { none, sum, mean };

struct LossParams {
  int64_t rows = 0;     // N
  int64_t columns = 0;  // V, the vocabulary that both models share
  Rows student, teacher;
  Rows gradient;                 // data == nullptr: the value alone
  int64_t gradient_columns = 0;  // the student's own width; columns beyond V get gradient 0
  bool fresh_gradient = false;   // newly allocated, not yet touched

  const int64_t* labels = nullptr;                 // (N) or null
  const float* token_weights = nullptr;            // (N) or null
  const float* temperatures = nullptr;             // (N) or null: one per row instead of options.temperature
  float student_softcap = 0, teacher_softcap = 0;  // 0: none
  int64_t ignore_index = -100;
  RowOptions options;

  float* row_loss = nullptr;  // (N): weighted, not divided
  float* stats = nullptr;     // (5, N) or null: kd, ce, student entropy, teacher entropy, top-1 agreement
  float gradient_scale = 1;   // already in the stored gradient: 1 / denominator, or 1

  FASTKD_METHOD bool ignored(int64_t n) const { return labels && labels[n] == ignore_index; }
  FASTKD_METHOD float weight(int64_t n) const { return token_weights ? token_weights[n] : 1.0f; }
  FASTKD_METHOD bool needs_hard() const { return labels && (options.ce_weight != 0 || stats); }
  // write(address, number) for each statistic of row n
  template <class Write>
  FASTKD_METHOD void write_stats(int64_t n, const RowOutcome& out, const Write& write) const {
    write(stats + n, out.divergence);
    write(stats + rows + n, out.cross_entropy);
    write(stats + 2 * rows + n, out.student_entropy);
    write(stats + 3 * rows + n, out.teacher_entropy);
    write(stats + 4 * rows + n, out.top1_agreement);
  }
};

// Multiplies rows of a stored gradient: row n by factor[n * factor_stride].
struct RescaleParams {
  int64_t rows = 0, columns = 0;
  Rows gradient, source;  // gradient = factor * source; both may be the same memory
  const float* factor = nullptr;
  int64_t factor_stride = 0;  // 0: one factor for all rows
  float common = 1;           // times this
};

// Runs body(context, begin, end) over [0, n) on the caller's thread pool, in pieces of at least `grain`.
struct Executor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t n, int64_t grain, Body body, void* context);
  int threads;
};

// What was wrong with the values of the arguments.
struct Status {
  enum Code {
    ok,
    label_out_of_range,
    bad_temperature,
    // of a sparse teacher's row, in the order in which they are looked for
    bad_id,
    bad_logprob,
    bad_weight,
    duplicate_id,
    excess_mass,
    no_entry,
  } code = ok;
  int64_t row = 0;
  int64_t entry = 0;  // of K
};

}  // namespace fastkd
