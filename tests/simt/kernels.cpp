// The shipped kernels, launch arithmetic and host side on the machine, as operators torch.ops.fastkd.simt_*: tensors on
// the CPU in, loss and gradient out, by what a GPU would run. And the Python module that sets the device up and tells
// what was launched.
#include <torch/csrc/stable/library.h>

#include "../../csrc/kernels/cuda/launch.h"
#include "../../csrc/kernels/cuda/limits.h"
#include "../../csrc/torch/shard_arguments.h"
#include "../../csrc/torch/sparse_arguments.h"
#include "binding.h"
#include "driver/driver.h"
#include "driver/staging.h"

namespace fastkd {
namespace {

namespace py = pybind11;
using simt::driver;
using simt::Staging;

struct Settings {
  GpuLimits limits = {90, 132, 227 * 1024, 228 * 1024, 16};  // of an H100
  std::string variant;  // "block", "cluster", "streaming" whatever the arithmetic would choose; "": what it chooses
  int threads = 64;     // a block of a variant that was chosen here
  int parts = 1;        // its blocks a row
  std::string wrong;    // what staging found in the latest call
  Plan plan;            // of the latest call
} settings;

// A plan for shapes that the arithmetic would give to another variant.
Plan bend(Plan plan, const LossParams& p, const Problem& problem) {
  const bool streaming = settings.variant == "streaming";
  const int scratch = problem.sparse ? kSparseScratchBytes : kBlockScratchBytes;
  const int64_t chunks = p.columns / plan.access.width;
  plan.variant = streaming ? Variant::streaming : settings.parts == 1 ? Variant::block : Variant::cluster;
  plan.threads = settings.threads;
  plan.splits = streaming ? settings.parts : 1;
  plan.bulk = !streaming && brings_in_bulk(settings.limits, p.student.dtype, p.teacher.dtype);
  plan.cluster = streaming ? 1 : settings.parts;
  plan.blocks = streaming && !p.gradient.data ? p.rows : p.rows * settings.parts;
  plan.team_chunks = static_cast<int>((chunks + plan.cluster - 1) / plan.cluster);
  plan.team_bytes = scratch + static_cast<int>(chunk_bytes_of(problem, plan.team_chunks, plan.access.width));
  const int64_t streamed = (chunks + plan.splits - 1) / plan.splits;
  const int map = problem.sparse && plan.access.vectors ? static_cast<int>((streamed + 15) / 16 * 16) : 0;
  plan.shared_bytes = streaming ? scratch + map : plan.team_bytes;
  return plan;
}

// plan: what the arithmetic chooses.
Plan plan_of(const Plan& plan, LossParams p, bool sparse) {
  if (sparse) p.teacher = p.student;
  // rows without common boundaries can only be streamed
  const bool chosen = settings.variant.empty() || (settings.variant != "streaming" && !plan.access.vectors);
  return chosen ? plan : bend(plan, p, problem_of(p, sparse));
}

void check(const char* error) {
  const std::string found = driver.text() + settings.wrong;
  STD_TORCH_CHECK(found.empty(), found);
  STD_TORCH_CHECK(!error, "fastkd on CUDA: ", error);
}

struct Simt {
  static Outputs loss(LossParams p, const Tensor& student, const Tensor& teacher, RowTensors rows, const Scalars& o) {
    fill_params(p, student, teacher, rows, o);
    return run(p, student, rows, o, [&](Staging& staging, CudaCall& call) {
      settings.plan = plan_of(plan_call(call.params, settings.limits), call.params, false);
      const int64_t bytes = workspace_bytes(call.params, call.reduction, settings.plan);
      call.workspace = staging.workspace("workspace", bytes);
      begin(staging);
      return run_loss_cuda(call, settings.plan, nullptr);
    });
  }

  static Outputs sparse(LossParams p, SparseTeacher teacher, const Tensor& student, RowTensors rows, const Scalars& o) {
    fill_params(p, student, student, rows, o);
    return run(p, student, rows, o, [&](Staging& staging, CudaCall& call) {
      const int64_t entries = p.rows * teacher.k;
      teacher.ids = staging.input("ids", teacher.ids, entries);
      teacher.logprobs = staging.input("logprobs", teacher.logprobs, entries);
      teacher.weights = staging.input("weights", teacher.weights, entries);
      settings.plan = plan_of(plan_sparse(call.params, settings.limits), call.params, true);
      const int64_t bytes = sparse_workspace_bytes(call, teacher, settings.plan);
      call.workspace = staging.workspace("workspace", bytes);
      begin(staging);
      return run_sparse_cuda(call, teacher, settings.plan, nullptr);
    });
  }

  static void shard(ShardCall call, const Tensor&) {
    LossParams& p = call.params;
    Staging staging;
    stage_rows(staging, p);
    p.labels = staging.input("labels", p.labels, p.rows);
    p.temperatures = staging.input("temperatures", p.temperatures, p.rows);
    call.rows = staging.input("rows", call.rows, kRowFields * p.rows);
    call.out = staging.output("sums", call.out, (call.step == ShardStep::sums ? kFields : 2) * p.rows);
    if (p.stats) p.stats = call.out;  // a wish, no address
    settings.plan = plan_shard(p, settings.limits);
    if (settings.variant == "streaming") settings.plan = bend(settings.plan, p, problem_of(p, false));
    void* const workspace = staging.workspace("workspace", shard_workspace_bytes(call, settings.plan));
    begin(staging);
    const char* error = run_shard_cuda(call, workspace, settings.plan, nullptr);
    end(staging, error);
  }

  static void rescale(Rows source, Rows target, const Tensor& gradient, const Tensor& upstream, const Tensor& pending) {
    RescaleParams p;
    const RescaleTensors kept = fill_rescale(p, source, target, gradient, upstream, pending);
    Staging staging;
    const bool inplace = source.data == target.data;
    p.gradient = staging.rows("gradient", target, p.rows, p.columns, inplace, true);
    p.source = inplace ? p.gradient : staging.rows("source", source, p.rows, p.columns, true, false);
    p.factor = staging.input("upstream", p.factor, p.factor_stride ? p.rows : 1);
    const float* common = staging.input("pending", static_cast<const float*>(kept.pending.const_data_ptr()), 1);
    begin(staging);
    const char* error = run_rescale_cuda(p, common, settings.limits, nullptr);
    end(staging, error);
  }

 private:
  // The call on staged tensors that `enqueue(staging, call)` runs.
  template <class Enqueue>
  static Outputs run(LossParams p, const Tensor& student, RowTensors& rows, const Scalars& o, const Enqueue& enqueue) {
    CudaCall call;
    call.reduction = parse_reduction(o.reduction);
    Outputs out = new_outputs(p, student, o);
    Staging staging;
    stage_rows(staging, p);
    p.labels = staging.input("labels", p.labels, p.rows);
    p.token_weights = staging.input("token_weights", p.token_weights, p.rows);
    p.temperatures = staging.input("temperatures", p.temperatures, p.rows);
    p.stats = staging.output("stats", p.stats, 5 * p.rows);
    call.num_items = staging.input("num_items", float_data(rows.num_items), 1);
    const int64_t losses = call.reduction == Reduction::none ? p.rows : 1;
    call.loss = staging.output("loss", static_cast<float*>(out.loss.mutable_data_ptr()), losses);
    call.pending = staging.output("pending", static_cast<float*>(out.pending.mutable_data_ptr()), 1);
    call.params = p;
    const char* error = enqueue(staging, call);
    end(staging, error);
    return out;
  }

  static void stage_rows(Staging& staging, LossParams& p) {
    const bool inplace = p.gradient.data == p.student.data;
    p.teacher = staging.rows("teacher", p.teacher, p.rows, p.columns, true, false);
    if (inplace) {
      p.student = p.gradient = staging.rows("student", p.student, p.rows, p.gradient_columns, true, true);
      return;
    }
    p.student = staging.rows("student", p.student, p.rows, p.columns, true, false);
    p.gradient = staging.rows("gradient", p.gradient, p.rows, p.gradient_columns, false, true);
  }
  static void begin(Staging& staging) {
    driver.reset();
    driver.memory = &staging.memory;
    settings.wrong.clear();
  }
  static void end(Staging& staging, const char* error) {
    driver.memory = nullptr;
    if (!error) settings.wrong = staging.take_back();
    check(error);
  }
};

py::list launches() {
  using namespace py::literals;
  py::list all;
  for (const simt::Launch& launch : driver.launches) {
    const simt::Config& c = launch.config;
    py::dict d = simt::dict_of(launch.report, launch.buffers);
    d["kernel"] = launch.kernel;
    d["grid"] = c.grid, d["cluster"] = c.cluster, d["threads"] = c.threads, d["given_shared_bytes"] = c.shared_bytes;
    all.append(d);
  }
  return all;
}

// Keywords that are left out return to their defaults: an H100.
void configure(const py::dict& keywords) {
  settings = Settings();
  driver.seed = 0;
  for (const auto& item : keywords) {
    const std::string key = py::str(item.first);
    if (key == "seed")
      driver.seed = item.second.cast<uint64_t>();
    else if (key == "arch")
      settings.limits.arch = item.second.cast<int>();
    else if (key == "multiprocessors")
      settings.limits.multiprocessors = item.second.cast<int>();
    else if (key == "shared_per_block")
      settings.limits.shared_per_block = item.second.cast<int>();
    else if (key == "shared_per_multiprocessor")
      settings.limits.shared_per_multiprocessor = item.second.cast<int>();
    else if (key == "largest_cluster")
      settings.limits.largest_cluster = item.second.cast<int>();
    else if (key == "threads")
      settings.threads = item.second.cast<int>();
    else if (key == "parts")
      settings.parts = item.second.cast<int>();
    else if (key == "variant")
      settings.variant = item.second.cast<std::string>();
    else
      throw py::key_error("configure has no '" + key + "'");
  }
}

py::dict plan() {
  using namespace py::literals;
  const Plan& p = settings.plan;
  return py::dict("variant"_a = std::string(name_of(p.variant)), "threads"_a = p.threads, "blocks"_a = p.blocks,
                  "cluster"_a = p.cluster, "splits"_a = p.splits, "shared_bytes"_a = p.shared_bytes,
                  "sweeps"_a = p.sweeps, "vectors"_a = p.access.vectors, "width"_a = p.access.width, "bulk"_a = p.bulk,
                  "reason"_a = p.reason);
}

// What gpu_limits makes of the driver's device, or its error.
py::object limits(int device) {
  using namespace py::literals;
  GpuLimits found;
  driver.reset();
  if (const char* error = gpu_limits(device, &found)) return py::str(error);
  return py::dict(
      "arch"_a = found.arch, "multiprocessors"_a = found.multiprocessors, "shared_per_block"_a = found.shared_per_block,
      "shared_per_multiprocessor"_a = found.shared_per_multiprocessor, "largest_cluster"_a = found.largest_cluster);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  using Simt = fastkd::Operators<fastkd::Simt>;
  m.impl("simt_forward", TORCH_BOX(&Simt::kd_forward));
  m.impl("simt_forward_", TORCH_BOX(&Simt::kd_forward_));
  m.impl("simt_rescale", TORCH_BOX(&Simt::kd_rescale));
  m.impl("simt_rescale_", TORCH_BOX(&Simt::kd_rescale_));
  using Sparse = fastkd::SparseOperators<fastkd::Simt>;
  m.impl("simt_sparse_forward", TORCH_BOX(&Sparse::sparse_forward));
  m.impl("simt_sparse_forward_", TORCH_BOX(&Sparse::sparse_forward_));
  using Shard = fastkd::ShardOperators<fastkd::Simt>;
  m.impl("simt_shard_sums", TORCH_BOX(&Shard::shard_sums));
  m.impl("simt_shard_terms", TORCH_BOX(&Shard::shard_terms));
  m.impl("simt_shard_gradient", TORCH_BOX(&Shard::shard_gradient));
  m.impl("simt_shard_gradient_", TORCH_BOX(&Shard::shard_gradient_));
}

PYBIND11_MODULE(simt_kernels, m) {
  m.def("announce", &simt::announce_kernels);
  m.def("configure", [](const pybind11::kwargs& keywords) { fastkd::configure(keywords); });
  m.def("launches", &fastkd::launches);
  m.def("plan", &fastkd::plan);
  m.def("limits", &fastkd::limits);
  m.attr("piece_bytes") = sizeof(fastkd::Piece);
  m.attr("term_bytes") = sizeof(fastkd::TermSums);
  m.attr("student_piece_bytes") = sizeof(fastkd::StudentPiece);
}
