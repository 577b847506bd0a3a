// The CPU implementations of torch.ops.fastkd: tensors in, parameters filled, kernels called.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/products_launch.h"
#include "../kernels/cpu/shard_launch.h"
#include "../kernels/cpu/sparse_launch.h"
#include "lingering_tensor.h"
#include "shard_arguments.h"
#include "sparse_arguments.h"

namespace fastkd {
namespace {

Executor torch_threads() {
  Executor executor;
  executor.threads = static_cast<int>(torch::stable::get_num_threads());
  executor.run = [](int64_t n, int64_t grain, Executor::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return executor;
}

void check_kernels() {
  const char* isa_error = "";
  STD_TORCH_CHECK(selected_kernels(&isa_error), isa_error);
}

void raise_for(const Status& status, const RowTensors& rows) {
  const auto n = static_cast<size_t>(status.row);
  STD_TORCH_CHECK(status.code != Status::label_out_of_range, "labels[", n, "] = ", int_data(rows.labels)[n],
                  " is neither a column of the shared vocabulary nor ignore_index");
  STD_TORCH_CHECK(status.code != Status::bad_temperature, "temperature[", n, "] = ", float_data(rows.temperatures)[n],
                  " must be a finite number > 0");
}

// The call that `compute(call)` finishes.
template <class Compute>
Outputs run(LossParams& p, const Tensor& student, const Tensor& teacher, RowTensors& rows, const Scalars& o,
            const Compute& compute) {
  check_kernels();
  fill_params(p, student, teacher, rows, o);
  LossCall call;
  call.reduction = parse_reduction(o.reduction);
  call.num_items = float_data(rows.num_items);
  Outputs out = new_outputs(p, student, o);
  call.loss = static_cast<float*>(out.loss.mutable_data_ptr());
  call.pending_scale = static_cast<float*>(out.pending.mutable_data_ptr());
  call.params = p;
  raise_for(compute(call), rows);
  return out;
}

// A fresh gradient in lingering memory, where that is to be had.
Tensor lingering_gradient(LossParams& p, const Tensor& student) {
  std::optional<Tensor> gradient =
      lingering_tensor(gradient_shape(student), dtype_of("student_logits", student), 0, std::nullopt);
  if (!gradient) return fresh_gradient(p, student);
  p.gradient = *view_as_rows("gradient", *gradient);  // its huge pages are advised already: not fresh_gradient
  return *gradient;
}

struct Cpu {
  static Outputs loss(LossParams p, const Tensor& student, const Tensor& teacher, RowTensors rows, const Scalars& o) {
    return run(p, student, teacher, rows, o, [](const LossCall& call) { return run_loss_cpu(call, torch_threads()); });
  }

  static Outputs sparse(LossParams p, const SparseTeacher& teacher, const Tensor& student, RowTensors rows,
                        const Scalars& o) {
    return run(p, student, student, rows, o, [&](const LossCall& call) {
      const Status status = run_sparse_cpu(call, teacher, torch_threads());
      raise_for_teacher(status, teacher);
      return status;
    });
  }

  static void shard(const ShardCall& call, const Tensor&) {
    check_kernels();
    run_shard_cpu(call, torch_threads());
  }

  static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
    RescaleParams p;
    const RescaleTensors kept = fill_rescale(p, source, target, gradient, upstream, pending);
    p.common = *static_cast<const float*>(kept.pending.const_data_ptr());
    run_rescale_cpu(p, torch_threads());
  }
};

// A matrix of unit column stride on the CPU.
Rows matrix(const char* name, const Tensor& x, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && (!dtype || x.scalar_type() == *dtype), name,
                  " must be a matrix on the CPU, of the operator's dtype");
  const auto rows = view_as_rows(name, x);
  STD_TORCH_CHECK(rows, name, " must have unit column stride");
  return *rows;
}

Tensor linear_memory(Tensor like, int64_t rows, int64_t columns, int64_t capacity, bool of_teacher) {
  const Lingers kind = of_teacher ? Lingers::teacher_logits : Lingers::student_logits;
  const auto bytes = static_cast<size_t>(std::max<int64_t>(capacity, 0));
  std::optional<Tensor> memory = lingering_tensor({rows, columns}, dtype_of("like", like), bytes, kind);
  return memory ? *memory : new_tensor(like, {rows, columns}, like.scalar_type());
}

void linear_add_(Tensor total, Tensor product) {
  check_kernels();
  AddParams p;
  p.total = matrix("total", total, ScalarType::Float);
  p.product = matrix("product", product, ScalarType::BFloat16);
  p.rows = total.size(0);
  p.columns = total.size(1);
  STD_TORCH_CHECK(product.size(0) == p.rows && product.size(1) == p.columns, "product must have the shape of total");
  run_add_cpu(p, torch_threads());
}

void linear_turn_(Tensor result, Tensor sum) {
  check_kernels();
  TurnParams p;
  p.result = matrix("result", result, std::nullopt);
  p.sum = matrix("sum", sum, ScalarType::Float);
  p.rows = result.size(0);
  p.columns = result.size(1);
  STD_TORCH_CHECK(sum.size(0) == p.columns && sum.size(1) == p.rows, "sum must have the shape of result.T");
  run_turn_cpu(p, torch_threads());
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  using Cpu = fastkd::Operators<fastkd::Cpu, fastkd::lingering_gradient>;
  m.impl("kd_forward", TORCH_BOX(&Cpu::kd_forward));
  m.impl("kd_forward_", TORCH_BOX(&Cpu::kd_forward_));
  m.impl("kd_rescale", TORCH_BOX(&Cpu::kd_rescale));
  m.impl("kd_rescale_", TORCH_BOX(&Cpu::kd_rescale_));
  using Sparse = fastkd::SparseOperators<fastkd::Cpu, fastkd::lingering_gradient>;
  m.impl("sparse_forward", TORCH_BOX(&Sparse::sparse_forward));
  m.impl("sparse_forward_", TORCH_BOX(&Sparse::sparse_forward_));
  using Shard = fastkd::ShardOperators<fastkd::Cpu, fastkd::lingering_gradient>;
  m.impl("shard_sums", TORCH_BOX(&Shard::shard_sums));
  m.impl("shard_terms", TORCH_BOX(&Shard::shard_terms));
  m.impl("shard_gradient", TORCH_BOX(&Shard::shard_gradient));
  m.impl("shard_gradient_", TORCH_BOX(&Shard::shard_gradient_));
  m.impl("linear_memory", TORCH_BOX(&fastkd::linear_memory));
  m.impl("linear_add_", TORCH_BOX(&fastkd::linear_add_));
  m.impl("linear_turn_", TORCH_BOX(&fastkd::linear_turn_));
}
