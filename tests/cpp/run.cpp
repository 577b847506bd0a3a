// One problem through the kernels and against its answers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>

#include "harness.h"

namespace harness {
namespace {

using fastkd::DType;

constexpr double kEps = 0x1p-24;
constexpr double kTolerance = 48;  // eps times the magnitude of what was added up

double half_ulp(DType dtype) { return dtype == DType::float32 ? 0x1p-24 : dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11; }
double step(DType dtype) { return dtype == DType::float16 ? 0x1p-24 : 0x1p-120; }

// Pieces of at least `grain` over new threads, as any pool would.
int thread_count = 1;

void run_on_threads(int64_t n, int64_t grain, fastkd::Executor::Body body, void* context) {
  const int64_t pieces = std::min<int64_t>(thread_count, (n + grain - 1) / grain);
  if (pieces <= 1) return body(context, 0, n);
  const int64_t size = (n + pieces - 1) / pieces;
  std::vector<std::thread> threads;
  for (int64_t begin = size; begin < n; begin += size)
    threads.emplace_back([=] { body(context, begin, std::min(begin + size, n)); });
  body(context, 0, size);
  for (auto& thread : threads) thread.join();
}

// The numbers of a problem, in memory and in fp64.
struct Data {
  std::vector<Row> rows;
  GuardedRows student, teacher, gradient;
  std::vector<int64_t> labels;
  std::vector<float> weights, temperatures;
  std::vector<int64_t> ids;     // (N, K)
  std::vector<float> logprobs;  // (N, K)

  explicit Data(const Problem& p);
};

Row make_row(const Problem& p, int64_t n, std::mt19937_64& random) {
  std::normal_distribution<double> normal(0, 3);
  Row row;
  row.student.resize(static_cast<size_t>(p.student_columns));
  row.teacher.resize(static_cast<size_t>(p.teacher_columns));
  for (double& x : row.student) x = normal(random);
  for (double& x : row.teacher) x = normal(random);
  const int64_t columns = std::min(p.student_columns, p.teacher_columns);
  row.student[static_cast<size_t>((n * 7 + columns - 1) % columns)] += p.peak + p.student_peak;
  row.teacher[static_cast<size_t>((n * 11 + columns / 2) % columns)] += p.peak;
  if (p.swapped) {
    std::fill(row.student.begin(), row.student.end(), 0.0);
    std::fill(row.teacher.begin(), row.teacher.end(), 0.0);
    row.student[0] = row.teacher[1] = 1;
  }
  if (p.identical) row.teacher = row.student;
  for (int64_t i = 0; i < columns; ++i) {
    const bool both = p.masked && (i % 7 == 3 || i >= columns - 40 || (columns > 4096 && i < 2048));
    if (both) row.student[static_cast<size_t>(i)] = -INFINITY;
    if (both || (p.masked && p.teacher_masks_more && i > columns / 2)) row.teacher[static_cast<size_t>(i)] = -INFINITY;
  }
  row.label = (n * 13 + columns - 1) % columns;
  if (p.masked) row.label = columns - 42;
  row.ignored = p.labels && n % 4 == 2;
  row.weight = p.weights ? 0.5 + 0.25 * static_cast<double>(n % 5) : 1;
  row.temperature = p.temperatures ? p.options.temperature * (n % 2 ? 1.0 : 0.5) : p.options.temperature;
  return row;
}

// K entries of the teacher's own log-probabilities, in no order and over the whole row; one of them padding.
void name_columns(const Problem& p, int64_t n, std::mt19937_64& random, Row& row) {
  const auto columns = static_cast<int64_t>(row.teacher.size());
  const double t = p.tail == fastkd::Tail::renormalize ? 1 : row.temperature;
  double top = -INFINITY, sum = 0;
  for (double x : row.teacher) top = std::max(top, x / t);
  for (double x : row.teacher) sum += std::exp(x / t - top);
  const int64_t step = columns > 2 && columns % 2 == 1 ? (columns + 1) / 2 : 1;  // coprime to the number of columns
  for (int64_t k = 0; k < p.k; ++k) {
    int64_t id = (columns - 1 + (n + k) * step) % columns;
    if (p.tail == fastkd::Tail::sampled) id = static_cast<int64_t>(random() % static_cast<uint64_t>(columns));
    const bool padding = k == 1 && n % 2 == 1;
    const double lp = row.teacher[static_cast<size_t>(id)] / t - top - std::log(sum);
    row.ids.push_back(padding ? -1 : id);
    row.logprobs.push_back(padding ? -INFINITY : static_cast<double>(static_cast<float>(lp)));
  }
}

Data::Data(const Problem& p)
    : student(p.rows, p.student_columns, p.student_columns + p.stride_gap, p.offset, p.student_dtype),
      teacher(p.rows, p.teacher_columns, p.teacher_columns + p.stride_gap, p.offset + 1, p.teacher_dtype),
      gradient(p.rows, p.student_columns, p.student_columns, 0, p.student_dtype) {
  std::mt19937_64 random(static_cast<uint64_t>(p.student_columns * 31 + p.rows));
  for (int64_t n = 0; n < p.rows; ++n) {
    Row row = make_row(p, n, random);
    for (int64_t i = 0; i < p.student_columns; ++i) {
      student.set(n, i, row.ignored ? NAN : row.student[static_cast<size_t>(i)]);
      row.student[static_cast<size_t>(i)] = student.get(n, i);  // what was stored is the problem
      gradient.set(n, i, NAN);
    }
    for (int64_t i = 0; i < p.teacher_columns; ++i) {
      teacher.set(n, i, row.ignored ? NAN : row.teacher[static_cast<size_t>(i)]);
      row.teacher[static_cast<size_t>(i)] = teacher.get(n, i);
    }
    if (p.k > 0) name_columns(p, n, random, row);
    for (int64_t k = 0; k < p.k; ++k) {  // ignored rows are not read
      const auto at = static_cast<size_t>(k);
      ids.push_back(row.ignored ? int64_t{1} << 40 : row.ids[at]);
      logprobs.push_back(row.ignored ? 7.0f : static_cast<float>(row.logprobs[at]));
    }
    labels.push_back(row.ignored ? -100 : row.label);
    weights.push_back(static_cast<float>(row.weight));
    temperatures.push_back(static_cast<float>(row.temperature));
    rows.push_back(row);
  }
  student.mark_gaps();
  teacher.mark_gaps();
}

struct Result {
  std::vector<float> loss, stats;
  float pending = 0;
  fastkd::Status status;
};

fastkd::LossCall call_of(const Problem& p, Data& d, Result& r) {
  fastkd::LossCall call;
  fastkd::LossParams& q = call.params;
  q.rows = p.rows;
  q.columns = std::min(p.student_columns, p.teacher_columns);
  q.student = d.student.rows();
  q.teacher = d.teacher.rows();
  q.gradient = p.in_place ? q.student : d.gradient.rows();
  q.gradient_columns = p.student_columns;
  q.fresh_gradient = !p.in_place;
  q.labels = p.labels ? d.labels.data() : nullptr;
  q.token_weights = p.weights ? d.weights.data() : nullptr;
  q.temperatures = p.temperatures ? d.temperatures.data() : nullptr;
  q.student_softcap = p.student_softcap;
  q.teacher_softcap = p.teacher_softcap;
  q.options = p.options;
  call.reduction = p.reduction;
  r.loss.assign(static_cast<size_t>(p.reduction == fastkd::Reduction::none ? p.rows : 1), NAN);
  r.stats.assign(static_cast<size_t>(5 * p.rows), NAN);
  q.stats = p.stats ? r.stats.data() : nullptr;
  call.loss = r.loss.data();
  call.pending_scale = &r.pending;
  return call;
}

fastkd::Status compute(const Problem& p, const Data& d, const fastkd::LossCall& call,
                       const fastkd::Executor& executor) {
  if (p.k == 0) return fastkd::run_loss_cpu(call, executor);
  fastkd::SparseTeacher teacher;
  teacher.ids = d.ids.data();
  teacher.logprobs = d.logprobs.data();
  teacher.k = p.k;
  teacher.tail = p.tail;
  teacher.temperature = p.tail == fastkd::Tail::renormalize ? 1.0f : 0.0f;
  teacher.resolution = fastkd::mass_resolution(0x1p-24f);
  teacher.mass_limit = fastkd::mass_limit(0x1p-24f);
  return fastkd::run_sparse_cpu(call, teacher, executor);
}

// Collects the first complaint.
class Report {
 public:
  void check(const char* what, int64_t row, int64_t column, double actual, double expected, double bound) {
    if (!text_.empty() || std::abs(actual - expected) <= bound || actual == expected) return;
    char line[200];
    std::snprintf(line, sizeof(line), "%s[%ld, %ld] = %.9g, expected %.9g, bound %.3g", what, static_cast<long>(row),
                  static_cast<long>(column), actual, expected, bound);
    text_ = line;
  }
  void require(bool good, const char* what) {
    if (text_.empty() && !good) text_ = what;
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

void check_stats(const Problem& p, const Result& r, int64_t n, const Answer& a, Report& report) {
  const double expected[] = {a.kd, a.ce, a.student_entropy, a.teacher_entropy, a.agreement};
  const double scale = a.loss_magnitude + 20;
  const char* names[] = {"kd", "ce", "student_entropy", "teacher_entropy", "agreement"};
  for (int i = 0; i < 5; ++i)
    report.check(names[i], n, 0, r.stats[static_cast<size_t>(i * p.rows + n)], expected[i],
                 4 * kTolerance * kEps * scale);
}

void compare(const Problem& p, Data& d, const Result& r, Report& report) {
  double total = 0, magnitude = 0, denominator = 0;
  std::vector<Answer> answers;
  for (int64_t n = 0; n < p.rows; ++n) {
    const Row& row = d.rows[static_cast<size_t>(n)];
    answers.push_back(answer_of(p, row));
    total += answers.back().loss;
    magnitude += answers.back().loss_magnitude;
    if (!row.ignored) denominator += row.weight;
  }
  if (p.reduction != fastkd::Reduction::mean || denominator == 0) denominator = 1;
  if (p.reduction != fastkd::Reduction::none)
    report.check("loss", 0, 0, r.loss[0], total / denominator, kTolerance * kEps * magnitude / denominator);
  const GuardedRows& gradient = p.in_place ? d.student : d.gradient;
  const bool rescaled =
      p.upstream != 1 || (p.student_dtype == DType::float16 && p.reduction == fastkd::Reduction::mean);
  const double roundings = rescaled ? 2.05 : 1.02;
  for (int64_t n = 0; n < p.rows; ++n) {
    const Answer& a = answers[static_cast<size_t>(n)];
    if (p.reduction == fastkd::Reduction::none)
      report.check("loss", n, 0, r.loss[static_cast<size_t>(n)], a.loss, kTolerance * kEps * a.loss_magnitude);
    if (p.stats) check_stats(p, r, n, a, report);
    const double factor = p.upstream / denominator;
    for (int64_t i = 0; i < p.student_columns; ++i) {
      const auto at = static_cast<size_t>(i);
      const double expected = a.gradient[at] * factor;
      const double stored = roundings * half_ulp(p.student_dtype) * std::abs(expected);
      const double smallest = a.magnitude[at] > 0 ? step(p.student_dtype) * (1 + std::abs(factor)) : 0;
      const double computed = (kTolerance * kEps * a.magnitude[at] + a.slack[at]) * std::abs(factor);
      const double bound = computed + stored + smallest;
      report.check("gradient", n, i, gradient.get(n, i), expected, bound);
    }
  }
}

// A wrong label or temperature in the last row: reported, and nothing written.
void check_refusals(const Problem& p, Report& report, const fastkd::Executor& executor) {
  if (p.rows == 0 || !p.labels || p.rows * p.student_columns > 20000) return;
  Data d(p);
  Result r;
  const int64_t last = p.rows - 1;
  d.labels[static_cast<size_t>(last)] = std::min(p.student_columns, p.teacher_columns);
  const double before = d.student.get(0, 0);
  fastkd::LossCall call = call_of(p, d, r);
  const fastkd::Status status = compute(p, d, call, executor);
  report.require(status.code == fastkd::Status::label_out_of_range && status.row == last, "label V was not refused");
  report.require(d.student.get(0, 0) == before, "logits were written although a label is wrong");
  d.labels[static_cast<size_t>(last)] = 0;
  d.temperatures[static_cast<size_t>(last)] = -1;
  call = call_of(p, d, r);
  call.params.temperatures = d.temperatures.data();
  report.require(compute(p, d, call, executor).code == fastkd::Status::bad_temperature,
                 "temperature -1 was not refused");
  if (p.k < 2 || p.tail == fastkd::Tail::sampled) return;
  d.temperatures[static_cast<size_t>(last)] = 1;
  const auto entry = static_cast<size_t>(last * p.k);
  const int64_t own = d.ids[entry];
  const auto refuses = [&](int64_t id, float lp, fastkd::Status::Code code, const char* what) {
    d.ids[entry] = id;
    d.logprobs[entry] = lp;
    call = call_of(p, d, r);
    const fastkd::Status found = compute(p, d, call, executor);
    report.require(found.code == code && found.row == last, what);
  };
  if (d.rows[static_cast<size_t>(last)].ignored) return;
  const float lp = d.logprobs[entry];
  refuses(call.params.columns, lp, fastkd::Status::bad_id, "id V was not refused");
  refuses(own, 0.01f, fastkd::Status::bad_logprob, "a probability above 1 was not refused");
  const int64_t other = d.ids[entry + static_cast<size_t>(p.k - 1)];
  if (other >= 0) refuses(other, lp, fastkd::Status::duplicate_id, "an id twice was not refused");
}

}  // namespace

std::string run_products(int threads) {
  thread_count = threads;
  return run_products(fastkd::Executor{run_on_threads, threads});
}

std::string run(const Problem& p, int threads) {
  thread_count = threads;
  const fastkd::Executor executor{run_on_threads, threads};
  Report report;
  Data d(p);
  Result r;
  fastkd::LossCall call = call_of(p, d, r);
  report.require(compute(p, d, call, executor).code == fastkd::Status::ok, "a good problem was refused");
  std::vector<float> upstream(static_cast<size_t>(p.rows), static_cast<float>(p.upstream));
  fastkd::RescaleParams rescale;
  rescale.rows = p.rows;
  rescale.columns = p.student_columns;
  rescale.gradient = rescale.source = call.params.gradient;
  rescale.factor = upstream.data();
  rescale.factor_stride = 1;
  rescale.common = r.pending;
  fastkd::run_rescale_cpu(rescale, executor);
  compare(p, d, r, report);
  report.require(d.student.gaps_are_marked() && d.teacher.gaps_are_marked(), "something was written between the rows");
  check_refusals(p, report, executor);

  // the value alone: the same bits
  Data again(p);
  Result value;
  fastkd::LossCall alone = call_of(p, again, value);
  alone.params.gradient.data = nullptr;
  compute(p, again, alone, executor);
  report.require(value.loss == r.loss, "the value alone differs from the value with gradient");
  return report.text();
}

}  // namespace harness
