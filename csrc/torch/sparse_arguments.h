// The operators with a sparse teacher: from their arguments to the parameters of the kernels, for every device.
#pragma once

#include "../kernels/sparse_params.h"
#include "arguments.h"

namespace fastkd {
namespace {

Tail parse_tail(const std::string& name) {
  if (name == "bucket") return Tail::bucket;
  if (name == "renormalize") return Tail::renormalize;
  if (name == "sampled") return Tail::sampled;
  STD_TORCH_CHECK(false, "tail '", name, "' is not known; allowed: bucket, renormalize, sampled");
}

float unit_roundoff_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return 0x1p-8f;
  return x.scalar_type() == ScalarType::Half ? 0x1p-11f : 0x1p-24f;
}

struct TeacherTensors {
  Tensor ids, logprobs;
  OptionalTensor weights;
};

Tensor per_entry(const char* name, const Tensor& x, ScalarType dtype, const Tensor& ids) {
  STD_TORCH_CHECK(same_device(x, ids), name, " must be on the device of the logits");
  STD_TORCH_CHECK(x.dim() == ids.dim() && x.numel() == ids.numel(), name, " must have the shape of ids");
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// The teacher in memory that the kernels read; `tensors` keep it alive.
SparseTeacher teacher_of(TeacherTensors& tensors, const Tensor& student, const std::string& tail,
                         const Tensor& numbers) {
  Tensor& ids = tensors.ids;
  STD_TORCH_CHECK(student.dim() >= 1 && columns_of(student) >= 1, "student_logits must be (..., V) with V >= 1");
  STD_TORCH_CHECK(same_device(ids, student), "ids must be on the device of the logits");
  STD_TORCH_CHECK(ids.dim() == student.dim() && columns_of(ids) >= 1 && rows_of(ids) == rows_of(student),
                  "ids must be (..., K) with K >= 1 and the leading shape of student_logits");
  const float unit_roundoff = unit_roundoff_of(tensors.logprobs);
  tensors.logprobs = per_entry("logprobs", tensors.logprobs, ScalarType::Float, ids);
  if (tensors.weights) tensors.weights = per_entry("weights", *tensors.weights, ScalarType::Float, ids);
  ids = per_entry("ids", ids, ScalarType::Long, ids);
  SparseTeacher teacher;
  teacher.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  teacher.logprobs = static_cast<const float*>(tensors.logprobs.const_data_ptr());
  teacher.weights = float_data(tensors.weights);
  teacher.k = columns_of(ids);
  teacher.tail = parse_tail(tail);
  STD_TORCH_CHECK(numbers.numel() == 8, "scalars must be 8 numbers");
  teacher.temperature = static_cast<float>(static_cast<const double*>(numbers.const_data_ptr())[7]);
  teacher.resolution = mass_resolution(unit_roundoff);
  teacher.mass_limit = mass_limit(unit_roundoff);
  return teacher;
}

[[maybe_unused]] void raise_for_teacher(const Status& status, const SparseTeacher& t) {
  const int64_t at = status.row * t.k + status.entry;
  switch (status.code) {
    case Status::bad_id:
      STD_TORCH_CHECK(false, "ids[", status.row, ", ", status.entry, "] = ", t.ids[at], " is no column and no padding");
    case Status::bad_logprob:
      STD_TORCH_CHECK(false, "logprobs[", status.row, ", ", status.entry, "] = ", t.logprobs[at],
                      " is no log-probability");
    case Status::bad_weight:
      STD_TORCH_CHECK(false, "weights[", status.row, ", ", status.entry, "] = ", t.weights[at],
                      " must be a finite number >= 0");
    case Status::duplicate_id:
      STD_TORCH_CHECK(false, "ids[", status.row, ", ", status.entry, "] = ", t.ids[at], " stands twice in its row");
    case Status::excess_mass: STD_TORCH_CHECK(false, "the probabilities of logprobs[", status.row, "] sum above 1");
    case Status::no_entry: STD_TORCH_CHECK(false, "ids[", status.row, "] names no column with probability");
    default: return;
  }
}

// The two operators of a device. Device brings
//   static Outputs sparse(LossParams, const SparseTeacher&, const Tensor& student, RowTensors, const Scalars&)
template <class Device, Tensor (*kGradient)(LossParams&, const Tensor& student) = fresh_gradient>
struct SparseOperators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_forward(
      Tensor student, Tensor ids, Tensor logprobs, OptionalTensor weights, OptionalTensor labels,
      OptionalTensor token_weights, OptionalTensor temperatures, OptionalTensor num_items, Tensor numbers,
      std::string tail, std::string divergence, bool scale_by_t2, int64_t ignore_index, std::string reduction,
      bool with_stats, bool with_gradient) {
    TeacherTensors kept{ids, logprobs, weights};
    const SparseTeacher teacher = teacher_of(kept, student, tail, numbers);
    LossParams p;
    p.student = rows_or_copy("student_logits", student);
    Tensor gradient = new_gradient<kGradient>(p, student, with_gradient);
    const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
    Outputs out = Device::sparse(p, teacher, student, {labels, token_weights, temperatures, num_items}, scalars);
    return {out.loss, gradient, out.pending, out.stats};
  }

  static std::tuple<Tensor, Tensor, Tensor> sparse_forward_(Tensor student, Tensor ids, Tensor logprobs,
                                                            OptionalTensor weights, OptionalTensor labels,
                                                            OptionalTensor token_weights, OptionalTensor temperatures,
                                                            OptionalTensor num_items, Tensor numbers, std::string tail,
                                                            std::string divergence, bool scale_by_t2,
                                                            int64_t ignore_index, std::string reduction,
                                                            bool with_stats) {
    TeacherTensors kept{ids, logprobs, weights};
    const SparseTeacher teacher = teacher_of(kept, student, tail, numbers);
    LossParams p;
    overwrite(p, student);
    const Scalars scalars{numbers, divergence, scale_by_t2, ignore_index, reduction, with_stats};
    Outputs out = Device::sparse(p, teacher, student, {labels, token_weights, temperatures, num_items}, scalars);
    return {out.loss, out.pending, out.stats};
  }
};

}  // namespace
}  // namespace fastkd
