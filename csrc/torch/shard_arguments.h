// The arguments of torch.ops.fastkd.shard_*: a process's columns of both models.
#pragma once

#include "../kernels/shard_params.h"
#include "arguments.h"

namespace fastkd {
namespace {

// Numbers as in library.cpp.
struct ShardArguments {
  OptionalTensor labels, temperatures;
  Tensor numbers;
  std::string divergence;
  bool scale_by_t2, with_stats;
  int64_t first_column, columns, vocabulary;
  OptionalTensor rows;
};

// The operators of a device. Device brings  static void shard(const ShardCall&, const Tensor& student)  and may make
// fresh gradients in memory of its own.
template <class Device, Tensor (*kGradient)(LossParams&, const Tensor& student) = fresh_gradient>
struct ShardOperators {
  // Everything but what is written; tensors of `a` and `kept` keep alive what the call points to.
  static ShardCall prepare(ShardStep step, Tensor& student, Tensor& teacher, ShardArguments& a, RowTensors& kept) {
    check_logits(student, teacher);
    STD_TORCH_CHECK(a.columns >= 1 && a.columns <= columns_of(student) && a.columns <= columns_of(teacher),
                    "columns must be in [1, the width of both logits]; got ", a.columns);
    ShardCall call;
    call.step = step;
    LossParams& p = call.params;
    p.student = rows_or_copy("student_logits", student);
    p.teacher = rows_or_copy("teacher_logits", teacher);
    kept = {a.labels, std::nullopt, a.temperatures, std::nullopt};
    fill_params(p, student, teacher, kept, {a.numbers, a.divergence, a.scale_by_t2, -1, "none", a.with_stats});
    p.columns = a.columns;
    call.first_column = a.first_column;
    call.vocabulary = a.vocabulary;
    if (a.rows) {
      STD_TORCH_CHECK(a.rows->numel() == kRowFields * p.rows && same_device(*a.rows, student), "rows must be (",
                      static_cast<int>(kRowFields), ", N) on the device of the logits");
      a.rows = torch::stable::contiguous(*a.rows);
      call.rows = float_data(a.rows);
    }
    STD_TORCH_CHECK(a.rows || step == ShardStep::sums, "rows are missing");
    return call;
  }

  static Tensor shard_sums(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor temperatures,
                           Tensor numbers, std::string divergence, bool scale_by_t2, bool with_stats,
                           int64_t first_column, int64_t columns, int64_t vocabulary) {
    ShardArguments a{labels,     temperatures, numbers, divergence, scale_by_t2,
                     with_stats, first_column, columns, vocabulary, std::nullopt};
    RowTensors kept;
    ShardCall call = prepare(ShardStep::sums, student, teacher, a, kept);
    Tensor out = new_tensor(student, {kFields, call.params.rows}, ScalarType::Float);
    call.out = static_cast<float*>(out.mutable_data_ptr());
    if (with_stats) call.params.stats = call.out;  // asks for their sums; nothing is written through it
    Device::shard(call, student);
    return out;
  }

  static Tensor shard_terms(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor temperatures,
                            Tensor numbers, std::string divergence, bool scale_by_t2, bool with_stats,
                            int64_t first_column, int64_t columns, int64_t vocabulary, Tensor rows) {
    ShardArguments a{labels,     temperatures, numbers, divergence, scale_by_t2,
                     with_stats, first_column, columns, vocabulary, rows};
    RowTensors kept;
    ShardCall call = prepare(ShardStep::terms, student, teacher, a, kept);
    Tensor out = new_tensor(student, {2, call.params.rows}, ScalarType::Float);
    call.out = static_cast<float*>(out.mutable_data_ptr());
    Device::shard(call, student);
    return out;
  }

  static Tensor shard_gradient(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor temperatures,
                               Tensor numbers, std::string divergence, bool scale_by_t2, bool with_stats,
                               int64_t first_column, int64_t columns, int64_t vocabulary, Tensor rows) {
    ShardArguments a{labels,     temperatures, numbers, divergence, scale_by_t2,
                     with_stats, first_column, columns, vocabulary, rows};
    RowTensors kept;
    ShardCall call = prepare(ShardStep::gradient, student, teacher, a, kept);
    Tensor gradient = kGradient(call.params, student);
    Device::shard(call, student);
    return gradient;
  }

  static void shard_gradient_(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor temperatures,
                              Tensor numbers, std::string divergence, bool scale_by_t2, bool with_stats,
                              int64_t first_column, int64_t columns, int64_t vocabulary, Tensor rows) {
    ShardArguments a{labels,     temperatures, numbers, divergence, scale_by_t2,
                     with_stats, first_column, columns, vocabulary, rows};
    RowTensors kept;
    STD_TORCH_CHECK(view_as_rows("student_logits", student),
                    "student_logits cannot be overwritten: its rows are not addressable by two strides");
    ShardCall call = prepare(ShardStep::gradient, student, teacher, a, kept);
    overwrite(call.params, student);
    Device::shard(call, student);
  }
};

}  // namespace
}  // namespace fastkd
