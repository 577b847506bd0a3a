// The CPU implementations of torch.ops.fastkd: tensors in, parameters filled, kernels called.
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/launch.h"
#include "rows.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

Divergence parse_divergence(const std::string& name) {
  if (name == "forward_kl") return Divergence::forward_kl;
  if (name == "reverse_kl") return Divergence::reverse_kl;
  if (name == "symmetric_kl") return Divergence::symmetric_kl;
  if (name == "jsd") return Divergence::jsd;
  if (name == "total_variation") return Divergence::total_variation;
  if (name == "skew_forward_kl") return Divergence::skew_forward_kl;
  if (name == "skew_reverse_kl") return Divergence::skew_reverse_kl;
  STD_TORCH_CHECK(false, "divergence '", name, "' is not known");
}

Reduction parse_reduction(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  STD_TORCH_CHECK(false, "reduction '", name, "' is not known; allowed: mean, sum, none");
}

Executor torch_threads() {
  Executor executor;
  executor.threads = static_cast<int>(torch::stable::get_num_threads());
  executor.run = [](int64_t n, int64_t grain, Executor::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return executor;
}

std::vector<int64_t> leading_shape(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  return shape;
}

Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty({shape.data(), shape.size()}, dtype);
}

// x as contiguous `dtype` with one value per row of the logits.
Tensor per_row(const char* name, const Tensor& x, ScalarType dtype, int64_t rows) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU like the logits");
  STD_TORCH_CHECK(x.numel() == rows, name, " must have one value a row: ", rows, "; got ", x.numel());
  STD_TORCH_CHECK(dtype != ScalarType::Long || x.scalar_type() == dtype, name, " must be int64");
  Tensor cast = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return torch::stable::contiguous(cast);
}

const int64_t* int_data(const OptionalTensor& x) {
  return x ? static_cast<const int64_t*>(x->const_data_ptr()) : nullptr;
}
const float* float_data(const OptionalTensor& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

void check_logits(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.is_cpu() && teacher.is_cpu(), "both logits must be on the CPU");
  STD_TORCH_CHECK(student.dim() >= 1 && teacher.dim() >= 1 && columns_of(student) >= 1 && columns_of(teacher) >= 1,
                  "logits must be (..., V) with V >= 1");
  STD_TORCH_CHECK(rows_of(student) == rows_of(teacher),
                  "student_logits and teacher_logits must have equally many rows; got ", rows_of(student), " and ",
                  rows_of(teacher));
}

// The arguments of both forward operators that are the same for all rows; numbers as in library.cpp.
struct Scalars {
  Tensor numbers;
  std::string divergence;
  bool scale_by_t2;
  int64_t ignore_index;
  std::string reduction;
  bool with_stats;
};

struct RowTensors {
  OptionalTensor labels, token_weights, temperatures, num_items;
};

struct Outputs {
  Tensor loss, pending, stats;
};

// Fills everything of the call but the gradient.
void fill_call(LossCall& call, const Tensor& student, const Scalars& o) {
  LossParams& p = call.params;
  STD_TORCH_CHECK(o.numbers.is_cpu() && o.numbers.is_contiguous() && o.numbers.numel() == 8 &&
                      o.numbers.scalar_type() == ScalarType::Double,
                  "scalars must be 8 contiguous float64 numbers on the CPU");
  const auto* numbers = static_cast<const double*>(o.numbers.const_data_ptr());
  const auto number = [&](int i) { return static_cast<float>(numbers[i]); };
  p.options = {parse_divergence(o.divergence),
               number(0),
               static_cast<float>(1 - numbers[0]),
               number(1),
               o.scale_by_t2,
               number(2),
               number(3),
               number(4),
               number(5)};
  p.student_softcap = number(6);
  p.teacher_softcap = number(7);
  p.ignore_index = o.ignore_index;
  p.gradient_columns = columns_of(student);
  call.reduction = parse_reduction(o.reduction);
}

void raise_for(const Status& status, const RowTensors& rows) {
  const auto n = static_cast<size_t>(status.row);
  STD_TORCH_CHECK(status.code != Status::label_out_of_range, "labels[", n, "] = ", int_data(rows.labels)[n],
                  " is neither a column of the shared vocabulary nor ignore_index");
  STD_TORCH_CHECK(status.code != Status::bad_temperature, "temperature[", n, "] = ", float_data(rows.temperatures)[n],
                  " must be a finite number > 0");
}

Outputs run(LossCall& call, const Tensor& student, const Tensor& teacher, RowTensors rows, const Scalars& o) {
  const char* isa_error = "";
  STD_TORCH_CHECK(selected_kernels(&isa_error), isa_error);
  LossParams& p = call.params;
  p.rows = rows_of(student);
  p.columns = columns_of(student) < columns_of(teacher) ? columns_of(student) : columns_of(teacher);
  if (rows.labels) rows.labels = per_row("labels", *rows.labels, ScalarType::Long, p.rows);
  if (rows.token_weights) rows.token_weights = per_row("token_weights", *rows.token_weights, ScalarType::Float, p.rows);
  if (rows.temperatures) rows.temperatures = per_row("temperature", *rows.temperatures, ScalarType::Float, p.rows);
  if (rows.num_items) rows.num_items = per_row("num_items_in_batch", *rows.num_items, ScalarType::Float, 1);
  p.labels = int_data(rows.labels);
  p.token_weights = float_data(rows.token_weights);
  p.temperatures = float_data(rows.temperatures);
  call.num_items = float_data(rows.num_items);
  fill_call(call, student, o);
  STD_TORCH_CHECK(p.options.ce_weight == 0 || rows.labels, "ce_weight needs labels");

  const std::vector<int64_t> shape = leading_shape(student);
  std::vector<int64_t> stats_shape = {o.with_stats ? 5 : 0};
  if (o.with_stats) stats_shape.insert(stats_shape.end(), shape.begin(), shape.end());
  Outputs out{new_tensor(call.reduction == Reduction::none ? shape : std::vector<int64_t>{}, ScalarType::Float),
              new_tensor({}, ScalarType::Float), new_tensor(stats_shape, ScalarType::Float)};
  call.loss = static_cast<float*>(out.loss.mutable_data_ptr());
  call.pending_scale = static_cast<float*>(out.pending.mutable_data_ptr());
  p.stats = o.with_stats ? static_cast<float*>(out.stats.mutable_data_ptr()) : nullptr;
  raise_for(run_loss_cpu(call, torch_threads()), rows);
  return out;
}

Rows rows_or_copy(const char* name, Tensor& x) {
  if (const auto rows = view_as_rows(name, x)) return *rows;
  x = torch::stable::contiguous(x);
  return *view_as_rows(name, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_forward(Tensor student, Tensor teacher, OptionalTensor labels,
                                                      OptionalTensor token_weights, OptionalTensor temperatures,
                                                      OptionalTensor num_items, Tensor numbers, std::string divergence,
                                                      bool scale_by_t2, int64_t ignore_index, std::string reduction,
                                                      bool with_stats, bool with_gradient) {
  check_logits(student, teacher);
  LossCall call;
  call.params.student = rows_or_copy("student_logits", student);
  call.params.teacher = rows_or_copy("teacher_logits", teacher);
  std::vector<int64_t> shape = {0};
  if (with_gradient) {
    shape = leading_shape(student);
    shape.push_back(columns_of(student));
  }
  Tensor gradient = new_tensor(shape, student.scalar_type());
  if (with_gradient) {
    call.params.gradient = *view_as_rows("gradient", gradient);
    call.params.fresh_gradient = true;
  }
  const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
  Outputs out = run(call, student, teacher, {labels, token_weights, temperatures, num_items}, scalars);
  return {out.loss, gradient, out.pending, out.stats};
}

std::tuple<Tensor, Tensor, Tensor> kd_forward_(Tensor student, Tensor teacher, OptionalTensor labels,
                                               OptionalTensor token_weights, OptionalTensor temperatures,
                                               OptionalTensor num_items, Tensor numbers, std::string divergence,
                                               bool scale_by_t2, int64_t ignore_index, std::string reduction,
                                               bool with_stats) {
  check_logits(student, teacher);
  LossCall call;
  const auto rows = view_as_rows("student_logits", student);
  STD_TORCH_CHECK(rows, "student_logits cannot be overwritten: its rows are not addressable by two strides");
  call.params.student = call.params.gradient = *rows;
  call.params.teacher = rows_or_copy("teacher_logits", teacher);
  const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
  Outputs out = run(call, student, teacher, {labels, token_weights, temperatures, num_items}, scalars);
  return {out.loss, out.pending, out.stats};
}

void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
  RescaleParams p;
  p.rows = rows_of(gradient);
  p.columns = columns_of(gradient);
  p.source = source;
  p.gradient = target;
  const bool per_row_upstream = upstream.dim() > 0;
  const Tensor factor = per_row("upstream", upstream, ScalarType::Float, per_row_upstream ? p.rows : 1);
  const Tensor common = per_row("pending", pending, ScalarType::Float, 1);
  p.factor = static_cast<const float*>(factor.const_data_ptr());
  p.factor_stride = per_row_upstream ? 1 : 0;
  p.common = *static_cast<const float*>(common.const_data_ptr());
  run_rescale_cpu(p, torch_threads());
}

Tensor kd_rescale(Tensor gradient, Tensor upstream, Tensor pending) {
  const Rows source = rows_or_copy("gradient", gradient);
  std::vector<int64_t> shape = leading_shape(gradient);
  shape.push_back(columns_of(gradient));
  Tensor scaled = new_tensor(shape, gradient.scalar_type());
  rescale(source, *view_as_rows("gradient", scaled), gradient, upstream, pending);
  return scaled;
}

void kd_rescale_(Tensor gradient, Tensor upstream, Tensor pending) {
  const auto rows = view_as_rows("gradient", gradient);
  STD_TORCH_CHECK(rows, "gradient cannot be scaled in place: its rows are not addressable by two strides");
  rescale(*rows, *rows, gradient, upstream, pending);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("kd_forward", TORCH_BOX(&fastkd::kd_forward));
  m.impl("kd_forward_", TORCH_BOX(&fastkd::kd_forward_));
  m.impl("kd_rescale", TORCH_BOX(&fastkd::kd_rescale));
  m.impl("kd_rescale_", TORCH_BOX(&fastkd::kd_rescale_));
}
