// From the arguments of torch.ops.fastkd to the parameters of the kernels: what every device does alike.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

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

std::vector<int64_t> leading_shape(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  return shape;
}

// On the device of `like`.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// x as contiguous `dtype` with one value per row of the logits `like`.
Tensor per_row(const char* name, const Tensor& x, ScalarType dtype, int64_t rows, const Tensor& like) {
  STD_TORCH_CHECK(same_device(x, like), name, " must be on the device of the logits");
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
  STD_TORCH_CHECK(same_device(student, teacher), "both logits must be on one device");
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

void fill_options(LossParams& p, const Scalars& o) {
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
}

// Fills everything but the logits, the gradient and what is written. `rows` keeps alive what the parameters point to.
void fill_params(LossParams& p, const Tensor& student, const Tensor& teacher, RowTensors& rows, const Scalars& o) {
  p.rows = rows_of(student);
  p.columns = columns_of(student) < columns_of(teacher) ? columns_of(student) : columns_of(teacher);
  p.gradient_columns = columns_of(student);
  const auto bring = [&](const char* name, OptionalTensor& x, ScalarType dtype, int64_t count) {
    if (x) x = per_row(name, *x, dtype, count, student);
  };
  bring("labels", rows.labels, ScalarType::Long, p.rows);
  bring("token_weights", rows.token_weights, ScalarType::Float, p.rows);
  bring("temperature", rows.temperatures, ScalarType::Float, p.rows);
  bring("num_items_in_batch", rows.num_items, ScalarType::Float, 1);
  p.labels = int_data(rows.labels);
  p.token_weights = float_data(rows.token_weights);
  p.temperatures = float_data(rows.temperatures);
  fill_options(p, o);
  STD_TORCH_CHECK(p.options.ce_weight == 0 || rows.labels, "ce_weight needs labels");
}

// What the operators return besides the gradient.
Outputs new_outputs(LossParams& p, const Tensor& student, const Scalars& o) {
  const std::vector<int64_t> shape = leading_shape(student);
  std::vector<int64_t> stats_shape = {o.with_stats ? 5 : 0};
  if (o.with_stats) stats_shape.insert(stats_shape.end(), shape.begin(), shape.end());
  const bool per_token = parse_reduction(o.reduction) == Reduction::none;
  Outputs out{new_tensor(student, per_token ? shape : std::vector<int64_t>{}, ScalarType::Float),
              new_tensor(student, {}, ScalarType::Float), new_tensor(student, stats_shape, ScalarType::Float)};
  p.stats = o.with_stats ? static_cast<float*>(out.stats.mutable_data_ptr()) : nullptr;
  return out;
}

// The student's shape.
std::vector<int64_t> gradient_shape(const Tensor& student) {
  std::vector<int64_t> shape = leading_shape(student);
  shape.push_back(columns_of(student));
  return shape;
}

// The gradient that kd_forward returns, in memory of torch's own.
Tensor fresh_gradient(LossParams& p, const Tensor& student) {
  Tensor gradient = new_tensor(student, gradient_shape(student), student.scalar_type());
  p.gradient = *view_as_rows("gradient", gradient);
  p.fresh_gradient = true;
  return gradient;
}

// The gradient that a forward operator returns: as kGradient makes it, or empty.
template <Tensor (*kGradient)(LossParams&, const Tensor& student)>
Tensor new_gradient(LossParams& p, const Tensor& student, bool with_gradient) {
  return with_gradient ? kGradient(p, student) : new_tensor(student, {0}, student.scalar_type());
}

// The logits as their own gradient's memory.
void overwrite(LossParams& p, const Tensor& student) {
  const auto rows = view_as_rows("student_logits", student);
  STD_TORCH_CHECK(rows, "student_logits cannot be overwritten: its rows are not addressable by two strides");
  p.student = p.gradient = *rows;
}

Rows rows_or_copy(const char* name, Tensor& x) {
  if (const auto rows = view_as_rows(name, x)) return *rows;
  x = torch::stable::contiguous(x);
  return *view_as_rows(name, x);
}

// The rescaling of a gradient into `target`. The tensors returned keep alive what the parameters point to.
struct RescaleTensors {
  Tensor upstream, pending;
};

RescaleTensors fill_rescale(RescaleParams& p, Rows source, Rows target, const Tensor& gradient, const Tensor& upstream,
                            const Tensor& pending) {
  p.rows = rows_of(gradient);
  p.columns = columns_of(gradient);
  p.source = source;
  p.gradient = target;
  const bool per_row_upstream = upstream.dim() > 0;
  RescaleTensors kept{per_row("upstream", upstream, ScalarType::Float, per_row_upstream ? p.rows : 1, gradient),
                      per_row("pending", pending, ScalarType::Float, 1, gradient)};
  p.factor = static_cast<const float*>(kept.upstream.const_data_ptr());
  p.factor_stride = per_row_upstream ? 1 : 0;
  return kept;
}

// The four operators of a device. Device brings
//   static Outputs loss(LossParams, const Tensor& student, const Tensor& teacher, RowTensors, const Scalars&)
//   static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor&
//   pending)
// and may make fresh gradients in memory of its own.
template <class Device, Tensor (*kGradient)(LossParams&, const Tensor& student) = fresh_gradient>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> kd_forward(Tensor student, Tensor teacher, OptionalTensor labels,
                                                               OptionalTensor token_weights,
                                                               OptionalTensor temperatures, OptionalTensor num_items,
                                                               Tensor numbers, std::string divergence, bool scale_by_t2,
                                                               int64_t ignore_index, std::string reduction,
                                                               bool with_stats, bool with_gradient) {
    check_logits(student, teacher);
    LossParams p;
    p.student = rows_or_copy("student_logits", student);
    p.teacher = rows_or_copy("teacher_logits", teacher);
    Tensor gradient = new_gradient<kGradient>(p, student, with_gradient);
    const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
    Outputs out = Device::loss(p, student, teacher, {labels, token_weights, temperatures, num_items}, scalars);
    return {out.loss, gradient, out.pending, out.stats};
  }

  static std::tuple<Tensor, Tensor, Tensor> kd_forward_(Tensor student, Tensor teacher, OptionalTensor labels,
                                                        OptionalTensor token_weights, OptionalTensor temperatures,
                                                        OptionalTensor num_items, Tensor numbers,
                                                        std::string divergence, bool scale_by_t2, int64_t ignore_index,
                                                        std::string reduction, bool with_stats) {
    check_logits(student, teacher);
    LossParams p;
    overwrite(p, student);
    p.teacher = rows_or_copy("teacher_logits", teacher);
    const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
    Outputs out = Device::loss(p, student, teacher, {labels, token_weights, temperatures, num_items}, scalars);
    return {out.loss, out.pending, out.stats};
  }

  static Tensor kd_rescale(Tensor gradient, Tensor upstream, Tensor pending) {
    const Rows source = rows_or_copy("gradient", gradient);
    Tensor scaled = new_tensor(gradient, gradient_shape(gradient), gradient.scalar_type());
    Device::rescale(source, *view_as_rows("gradient", scaled), gradient, upstream, pending);
    return scaled;
  }

  static void kd_rescale_(Tensor gradient, Tensor upstream, Tensor pending) {
    const auto rows = view_as_rows("gradient", gradient);
    STD_TORCH_CHECK(rows, "gradient cannot be scaled in place: its rows are not addressable by two strides");
    Device::rescale(*rows, *rows, gradient, upstream, pending);
  }
};

}  // namespace
}  // namespace fastkd
