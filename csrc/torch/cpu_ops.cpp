// The CPU implementations of torch.ops.fastkd: tensors in, parameters filled, kernels called.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/shard_launch.h"
#include "../kernels/cpu/sparse_launch.h"
#include "fresh_gradient.h"
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
  const char* isa_error = "";
  STD_TORCH_CHECK(selected_kernels(&isa_error), isa_error);
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
  std::optional<Tensor> gradient = lingering_tensor(gradient_shape(student), dtype_of("student_logits", student));
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
    const char* isa_error = "";
    STD_TORCH_CHECK(selected_kernels(&isa_error), isa_error);
    run_shard_cpu(call, torch_threads());
  }

  static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
    RescaleParams p;
    const RescaleTensors kept = fill_rescale(p, source, target, gradient, upstream, pending);
    p.common = *static_cast<const float*>(kept.pending.const_data_ptr());
    run_rescale_cpu(p, torch_threads());
  }
};

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
}
