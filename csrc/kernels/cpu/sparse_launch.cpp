// Host side of the sparse CPU kernel: the teacher's rows from what the caller gave, checked; scratch memory; threads.
#include "sparse_launch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace fastkd {
namespace {

// An entry of a row as it was given.
struct Entry {
  int64_t id, index;  // index: of K
  float logprob, weight;
};

constexpr int64_t kCacheLine = 16;  // floats

// Memory of one thread, kept between calls.
struct SparseMemory {
  std::vector<float> floats;
  std::vector<StudentPiece> pieces;
  std::vector<Entry> entries;
  std::vector<NamedColumn> named;

  SparseScratch scratch_for(int64_t columns) {
    const int64_t blocks = blocks_of(columns), width = blocks * kBlock;
    if (static_cast<int64_t>(floats.size()) < 2 * width + kCacheLine) {
      floats.resize(static_cast<size_t>(2 * width + kCacheLine));
    }
    if (static_cast<int64_t>(pieces.size()) < blocks) pieces.resize(static_cast<size_t>(blocks));
    const auto address = reinterpret_cast<uintptr_t>(floats.data());
    float* aligned = floats.data() + (64 - address % 64) % 64 / sizeof(float);
    return {aligned, aligned + width, pieces.data()};
  }
};

thread_local SparseMemory thread_memory;

struct TeacherView {
  const SparseTeacher& teacher;
  const LossParams& params;

  const int64_t* ids(int64_t n) const { return teacher.ids + n * teacher.k; }
  const float* logprobs(int64_t n) const { return teacher.logprobs + n * teacher.k; }
  const float* weights(int64_t n) const { return teacher.weights ? teacher.weights + n * teacher.k : nullptr; }
  // What the given log-probabilities are multiplied by to be those at the row's temperature, but for their normaliser.
  float softening(int64_t n) const {
    const float t = params.temperatures ? params.temperatures[n] : params.options.temperature;
    return teacher.temperature == 0 ? 1.0f : teacher.temperature / t;
  }
};

// The entries of a row that are no padding, by ascending id. A draw of probability 0 was never drawn.
Status collect(const TeacherView& view, int64_t n, std::vector<Entry>& entries) {
  const SparseTeacher& t = view.teacher;
  const float *logprobs = view.logprobs(n), *weights = view.weights(n);
  const int64_t* ids = view.ids(n);
  entries.clear();
  for (int64_t i = 0; i < t.k; ++i) {
    if (ids[i] < 0 && logprobs[i] == minus_infinity()) continue;
    if (ids[i] < 0 || ids[i] >= view.params.columns) return {Status::bad_id, n, i};
    if (!(std::exp(logprobs[i]) <= t.mass_limit)) return {Status::bad_logprob, n, i};
    const float weight = weights ? weights[i] : 1.0f;
    if (!(weight >= 0 && weight < INFINITY)) return {Status::bad_weight, n, i};
    if (t.tail == Tail::sampled && logprobs[i] == minus_infinity()) continue;
    entries.push_back({ids[i], i, logprobs[i], weight});
  }
  const auto before = [](const Entry& a, const Entry& b) { return a.id < b.id || (a.id == b.id && a.index < b.index); };
  if (!std::is_sorted(entries.begin(), entries.end(), before)) std::sort(entries.begin(), entries.end(), before);
  return {};
}

// 1 - sum p. The largest probability is near 1 where the difference cancels: its part of it is exact.
double mass_left(const std::vector<Entry>& entries) {
  size_t top = 0;
  for (size_t i = 1; i < entries.size(); ++i)
    if (entries[i].logprob > entries[top].logprob) top = i;
  double left = 1;
  if (!entries.empty()) left = -std::expm1(static_cast<double>(entries[top].logprob));
  for (size_t i = 0; i < entries.size(); ++i)
    if (i != top) left -= std::exp(static_cast<double>(entries[i].logprob));
  return left;
}

Status check_row(const TeacherView& view, int64_t n, std::vector<Entry>& entries) {
  const Status status = collect(view, n, entries);
  if (status.code != Status::ok) return status;
  const bool sampled = view.teacher.tail == Tail::sampled;
  for (size_t i = 1; i < entries.size() && !sampled; ++i)
    if (entries[i].id == entries[i - 1].id) return {Status::duplicate_id, n, entries[i].index};
  if (!sampled && 1 - mass_left(entries) > view.teacher.mass_limit) return {Status::excess_mass, n, 0};
  const bool possible =
      std::any_of(entries.begin(), entries.end(), [](const Entry& e) { return e.logprob > -INFINITY; });
  if (view.teacher.tail != Tail::bucket && !possible) return {Status::no_entry, n, 0};
  return {};
}

// Draws of one column become one: their weights add up, and what is added to the loss of them.
void merge_draws(const std::vector<Entry>& entries, bool weighted, std::vector<NamedColumn>& named) {
  const float each = weighted ? 1.0f : 1.0f / static_cast<float>(entries.size());
  for (const Entry& e : entries) {
    const float weight = each * e.weight, log2_p = kLog2e * e.logprob;
    if (named.empty() || named.back().column != e.id) {
      named.push_back({e.id, log2_p, weight});
      continue;
    }
    add_draw(named.back(), weight, log2_p);
  }
}

// log2 sum p of the named columns, taken relative to the largest.
float log2_mass(const std::vector<NamedColumn>& named) {
  float largest = minus_infinity();
  for (const NamedColumn& c : named) largest = std::max(largest, c.log2_p);
  double sum = 0;
  for (const NamedColumn& c : named) sum += std::exp2(c.log2_p - largest);
  return largest + static_cast<float>(std::log2(sum));
}

// A row of the teacher, valid by check_row.
SparseRow prepare(const TeacherView& view, int64_t n, SparseMemory& memory) {
  const SparseTeacher& t = view.teacher;
  collect(view, n, memory.entries);
  std::vector<NamedColumn>& named = memory.named;
  named.clear();
  SparseTail tail{t.tail, 0, t.resolution};
  if (t.tail == Tail::sampled) {
    merge_draws(memory.entries, t.weights != nullptr, named);
  } else {
    const float slope = kLog2e * view.softening(n);
    for (const Entry& e : memory.entries) named.push_back({e.id, e.logprob * slope});
    const double left = t.tail == Tail::bucket ? mass_left(memory.entries) : 0;
    tail.rest = static_cast<float>(std::max(left, 0.0));
    if (t.tail == Tail::renormalize || left < 0) {
      const float mass = log2_mass(named);
      for (NamedColumn& c : named) c.log2_p -= mass;
    }
  }
  return {named.data(), static_cast<int64_t>(named.size()), tail};
}

// The first bad row, or ok.
Status check_teacher(const TeacherView& view, const Executor& executor) {
  struct Context {
    const TeacherView& view;
    std::atomic<int64_t> first_bad;
  } context{view, {view.params.rows}};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    Context& context = *static_cast<Context*>(c);
    for (int64_t n = begin; n < end; ++n) {
      if (context.view.params.ignored(n)) continue;
      if (check_row(context.view, n, thread_memory.entries).code == Status::ok) continue;
      int64_t seen = context.first_bad.load();
      while (n < seen && !context.first_bad.compare_exchange_weak(seen, n)) {
      }
      return;
    }
  };
  executor.run(view.params.rows, 1 + serial_rows(view.params.columns), body, &context);
  const int64_t bad = context.first_bad.load();
  return bad < view.params.rows ? check_row(view, bad, thread_memory.entries) : Status{};
}

void ignore_row(const LossParams& p, int64_t n) {
  p.row_loss[n] = 0;
  if (p.stats)
    for (int i = 0; i < 5; ++i) p.stats[i * p.rows + n] = 0;
  if (!p.gradient.data) return;
  std::fill_n(p.gradient.row(n), p.gradient_columns * size_of(p.gradient.dtype), char{0});
}

void compute_row(const TeacherView& view, const CpuKernels& kernels, int64_t n, const Executor* executor) {
  const LossParams& p = view.params;
  if (p.ignored(n)) return ignore_row(p, n);
  const SparseRow row = prepare(view, n, thread_memory);
  kernels.sparse_row(p, n, row, thread_memory.scratch_for(p.columns), executor);
}

void compute_rows(const void* teacher, const LossParams& p, const CpuKernels& kernels, const Executor& executor) {
  const TeacherView view{*static_cast<const SparseTeacher*>(teacher), p};
  if (rows_are_shared(p, executor.threads)) {
    for (int64_t n = 0; n < p.rows; ++n) compute_row(view, kernels, n, &executor);
    return;
  }
  struct Context {
    const TeacherView& view;
    const CpuKernels& kernels;
  } context{view, kernels};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    const auto& [own_view, table] = *static_cast<Context*>(c);
    for (int64_t n = begin; n < end; ++n) compute_row(own_view, table, n, nullptr);
  };
  executor.run(p.rows, serial_rows(p.columns), body, &context);
}

}  // namespace

Status run_sparse_cpu(LossCall call, const SparseTeacher& teacher, const Executor& executor) {
  Status status = check_values(call.params);
  if (status.code == Status::ok && call.params.rows > 0) status = check_teacher({teacher, call.params}, executor);
  if (status.code == Status::ok) run_call_cpu(call, {compute_rows, &teacher}, executor);
  return status;
}

}  // namespace fastkd
