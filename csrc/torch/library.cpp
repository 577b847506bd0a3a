// The module fastkd._C and the schemas of torch.ops.fastkd: the single source of both operators' signatures.
#include <Python.h>

#include <string>

#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/lingering_memory.h"
#include "../kernels/cuda/plan.h"

// Everything of the loss but the way its gradient leaves. `(...)` is the leading shape of the logits.
// scalars: (8) float64 on the CPU whatever the logits' device: beta, temperature, kd_weight, ce_weight,
// label_smoothing, z_loss, student_softcap, teacher_softcap (0: none). A tensor, because a traced graph would be
// compiled anew for every value of a float argument.
#define FASTKD_LOSS_ARGUMENTS                                                                               \
  "Tensor teacher_logits, Tensor? labels, Tensor? token_weights, Tensor? temperatures, Tensor? num_items, " \
  "Tensor scalars, str divergence, bool scale_by_t2, int ignore_index, str reduction, bool with_stats"

// The same for a teacher that names K columns. ids: (..., K) int64, -1 with log-probability -inf where there is no
// entry; weights: of the draws of tail "sampled". scalars: the last one is the temperature of the log-probabilities, 0
// where they were taken at the loss's own.
#define FASTKD_SPARSE_ARGUMENTS                                                                                 \
  "Tensor ids, Tensor logprobs, Tensor? weights, Tensor? labels, Tensor? token_weights, Tensor? temperatures, " \
  "Tensor? num_items, Tensor scalars, str tail, str divergence, bool scale_by_t2, int ignore_index, "           \
  "str reduction, bool with_stats"

// The columns of one process: labels (N) int64, a column of the shard, 0 where another has it, -1 at ignored rows;
// first_column of `vocabulary`; columns: how many of the logits' are no padding.
#define FASTKD_SHARD_ARGUMENTS                                                                    \
  "Tensor teacher_logits, Tensor? labels, Tensor? temperatures, Tensor scalars, str divergence, " \
  "bool scale_by_t2, bool with_stats, int first_column, int columns, int vocabulary"

STABLE_TORCH_LIBRARY(fastkd, m) {
  // -> loss, gradient (empty without with_gradient), pending scale of the gradient, stats (5, ...) or empty
  m.def("kd_forward(Tensor student_logits, " FASTKD_LOSS_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  // Overwrites student_logits with the gradient. -> loss, pending scale, stats
  m.def("kd_forward_(Tensor(a!) student_logits, " FASTKD_LOSS_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  // Outputs as above.
  m.def("sparse_forward(Tensor student_logits, " FASTKD_SPARSE_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse_forward_(Tensor(a!) student_logits, " FASTKD_SPARSE_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  // -> sums of the piece (13, N), in the order of csrc/kernels/shard_params.h
  m.def("shard_sums(Tensor student_logits, " FASTKD_SHARD_ARGUMENTS ") -> Tensor");
  // rows (10, N): what the whole row is known by. -> sums of term and dlogq over the piece (2, N); the gradient
  m.def("shard_terms(Tensor student_logits, " FASTKD_SHARD_ARGUMENTS ", Tensor rows) -> Tensor");
  m.def("shard_gradient(Tensor student_logits, " FASTKD_SHARD_ARGUMENTS ", Tensor rows) -> Tensor");
  m.def("shard_gradient_(Tensor(a!) student_logits, " FASTKD_SHARD_ARGUMENTS ", Tensor rows) -> ()");
  // gradient * upstream * pending, row by row; upstream is 0-d or (...)
  m.def("kd_rescale(Tensor gradient, Tensor upstream, Tensor pending) -> Tensor");
  m.def("kd_rescale_(Tensor(a!) gradient, Tensor upstream, Tensor pending) -> ()");
  // Of the linear loss on the CPU: (rows, columns) of like's dtype in lingering memory of at least `capacity` bytes;
  // total (R, C) fp32 += product (R, C) bf16; result (V, H) = sum.T, rounded, of sum (H, V) fp32
  m.def("linear_memory(Tensor like, int rows, int columns, int capacity, bool of_teacher) -> Tensor");
  m.def("linear_add_(Tensor(a!) total, Tensor product) -> ()");
  m.def("linear_turn_(Tensor(a!) result, Tensor sum) -> ()");
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  const char* error = "";
  const fastkd::CpuKernels* kernels = fastkd::selected_kernels(&error);
  if (!kernels) {
    PyErr_SetString(PyExc_ValueError, error);
    return nullptr;
  }
  return PyUnicode_FromString(kernels->name);
}

PyObject* cpu_isas(PyObject*, PyObject*) { return PyUnicode_FromString(fastkd::runnable_isas()); }

PyObject* release_lingering_memory(PyObject*, PyObject*) {
  return PyLong_FromSize_t(fastkd::release_lingering_memory());
}

#if !defined(FASTKD_CUDA_ARCHS)
#define FASTKD_CUDA_ARCHS ""
#endif

PyObject* cuda_architectures(PyObject*, PyObject*) { return PyUnicode_FromString(FASTKD_CUDA_ARCHS); }

// See fastkd/cuda.py. The answer is one text, fields between tabs.
PyObject* cuda_plan(PyObject*, PyObject* arguments) {
  using fastkd::DType;
  fastkd::Problem p;
  fastkd::GpuLimits gpu;
  long long rows = 0, columns = 0;
  int student_bytes = 0, teacher_bytes = 0, mixed_kl = 0, with_gradient = 0, aligned = 0, sparse = 0, shard = 0;
  const char* wanted = "";
  if (!PyArg_ParseTuple(arguments, "LLiipppppiiiiis", &rows, &columns, &student_bytes, &teacher_bytes, &mixed_kl,
                        &with_gradient, &aligned, &sparse, &shard, &gpu.arch, &gpu.multiprocessors,
                        &gpu.shared_per_block, &gpu.shared_per_multiprocessor, &gpu.largest_cluster, &wanted)) {
    return nullptr;
  }
  const auto dtype = [](int bytes) { return bytes == 4 ? DType::float32 : DType::bfloat16; };
  p.rows = rows;
  p.columns = columns;
  p.student = dtype(student_bytes);
  p.teacher = dtype(teacher_bytes);
  p.mixed_kl = mixed_kl != 0;
  p.with_gradient = with_gradient != 0;
  p.aligned = aligned != 0;
  p.sparse = sparse != 0;
  p.shard = shard != 0;
  const fastkd::Plan plan = fastkd::plan_loss(p, gpu, fastkd::variant_of(wanted));
  std::string text = fastkd::name_of(plan.variant);
  for (const int64_t number :
       {plan.blocks, int64_t{plan.threads}, int64_t{plan.cluster}, int64_t{plan.splits}, int64_t{plan.shared_bytes},
        int64_t{plan.rows_per_block}, int64_t{plan.sweeps}, int64_t{plan.access.width}}) {
    text += "\t" + std::to_string(number);
  }
  return PyUnicode_FromString((text + "\t" + plan.reason).c_str());
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "Instruction set of the CPU kernels in use; ValueError if FASTKD_CPU_ISA names none."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets that this machine runs, separated by commas."},
    {"release_lingering_memory", release_lingering_memory, METH_NOARGS,
     "Gives freed memory that lingers for the next call back to the system; returns its bytes."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "What the CUDA kernels were compiled for; empty: not built."},
    {"cuda_plan", cuda_plan, METH_VARARGS, "The launch arithmetic of the CUDA kernels, which needs no GPU."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
