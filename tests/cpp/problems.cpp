// The harness's table: every divergence, dtype and option over widths beside the vector, the chunk and the page.
#include "harness.h"

namespace harness {
namespace {

using fastkd::Divergence;
using fastkd::DType;

constexpr Divergence kDivergences[] = {
    Divergence::forward_kl,      Divergence::reverse_kl,      Divergence::symmetric_kl,   Divergence::jsd,
    Divergence::total_variation, Divergence::skew_forward_kl, Divergence::skew_reverse_kl};
constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

Problem named(const std::string& name, Divergence divergence, int64_t rows, int64_t columns, DType dtype) {
  Problem p;
  p.name = name + " divergence " + std::to_string(static_cast<int>(divergence)) + " dtype " +
           std::to_string(static_cast<int>(dtype)) + " " + std::to_string(rows) + " x " + std::to_string(columns);
  p.options.divergence = divergence;
  p.options.beta = 0.3f;
  p.options.beta_rest = 0.7f;
  p.options.temperature = 2;
  p.rows = rows;
  p.student_columns = p.teacher_columns = columns;
  p.student_dtype = p.teacher_dtype = dtype;
  return p;
}

void add_widths(std::vector<Problem>& out, bool quick) {
  const std::vector<int64_t> few = {1, 3, 8, 17, 33, 2049, 4100};
  const std::vector<int64_t> all = {1,  2,  3,  4,  5,   7,    8,    9,    15,   16,   17,  31,
                                    32, 33, 47, 64, 100, 2047, 2048, 2049, 2080, 4097, 6150};
  int turn = 0;
  for (int64_t columns : quick ? few : all)
    for (Divergence d : kDivergences)
      for (DType dtype : kDTypes) {
        Problem p = named("widths", d, 3, columns, dtype);
        p.options.ce_weight = 0.7f;
        p.offset = turn % 5;
        p.stride_gap = turn % 3 * 3;
        p.in_place = turn % 2 == 0;
        p.weights = turn % 4 == 1;
        p.peak = columns > 2000 ? 20 : 0;
        ++turn;
        out.push_back(p);
      }
}

// Every option of the row, with a temperature of each kind: 1, square, power, own exponential, and one per row.
void add_options(std::vector<Problem>& out) {
  const float temperatures[] = {1, 2, 3, 5, 8, 9, 0.5f, 0.7f, 2.5f, 20};
  for (Divergence d : kDivergences)
    for (float temperature : temperatures) {
      Problem p = named("options T " + std::to_string(temperature), d, 2, 2100, DType::float32);
      p.options.temperature = temperature;
      p.options.ce_weight = 0.4f;
      p.options.kd_weight = 1.3f;
      p.options.label_smoothing = 0.1f;
      p.options.z_loss = 0.01f;
      p.stats = true;
      p.weights = true;
      out.push_back(p);
      p.name += " other half";
      p.options.scale_by_t2 = false;
      p.options.label_smoothing = 0;
      p.student_softcap = 6;
      p.teacher_softcap = 4;
      p.temperatures = true;
      p.reduction = fastkd::Reduction::none;
      p.in_place = true;
      p.upstream = -1.5;
      out.push_back(p);
    }
}

void add_values(std::vector<Problem>& out) {
  for (Divergence d : kDivergences)
    for (DType dtype : kDTypes) {
      Problem p = named("masked", d, 3, 2200, dtype);
      p.masked = true;
      p.options.ce_weight = 0.5f;
      out.push_back(p);
      p.student_columns = p.teacher_columns = 4203;
      p.name += " a whole chunk";
      out.push_back(p);
      if (d != Divergence::reverse_kl && d != Divergence::symmetric_kl) {  // those two are infinite
        p.teacher_masks_more = true;
        p.name += " and half the teacher";
        out.push_back(p);
      }
      p = named("identical", d, 3, 2100, dtype);
      p.identical = true;
      p.reduction = fastkd::Reduction::sum;
      out.push_back(p);
      p = named("tied columns", d, 3, 16, dtype);
      p.swapped = true;
      out.push_back(p);
      p = named("peaked", d, 3, 2200, dtype);
      p.peak = 60;
      p.options.temperature = 1;
      p.options.ce_weight = 0.5f;
      p.reduction = fastkd::Reduction::sum;
      out.push_back(p);
      p = named("truncated student", d, 3, 70, dtype);
      p.teacher_columns = 50;
      p.in_place = dtype != DType::float32;
      out.push_back(p);
      p = named("truncated teacher", d, 3, 2050, dtype);
      p.teacher_columns = 2070;
      p.labels = false;
      out.push_back(p);
      p = named("mixed dtypes", d, 3, 77, dtype);
      p.teacher_dtype = kDTypes[(static_cast<int>(dtype) + 1) % 3];
      p.labels = false;
      out.push_back(p);
    }
}

// Work enough for several threads, rows apart or shared.
void add_parallel(std::vector<Problem>& out, bool quick) {
  for (Divergence d : kDivergences) {
    if (quick && d != Divergence::forward_kl && d != Divergence::jsd) continue;
    Problem p = named("rows over threads", d, 41, 1500, DType::bfloat16);
    p.options.ce_weight = 0.5f;
    p.in_place = true;
    p.stats = true;
    out.push_back(p);
    p = named("a row over threads", d, 1, 70001, DType::float32);
    p.options.ce_weight = 0.5f;
    p.options.label_smoothing = 0.1f;
    p.options.temperature = 3;
    p.stats = true;
    p.peak = 30;
    out.push_back(p);
    p.in_place = true;
    p.name += " in place";
    out.push_back(p);
  }
}

// Rows of 16-bit logits so long that a thread makes most exponentials again for the gradient: a row a thread, and one
// row that all share.
void add_long_rows(std::vector<Problem>& out, bool quick) {
  const float temperatures[] = {2, 0.7f, 3, 1};  // square, own exponential, power, the tempered one itself
  int turn = 0;
  for (float temperature : temperatures)
    for (Divergence d : {Divergence::forward_kl, Divergence::reverse_kl, Divergence::symmetric_kl}) {
      const bool few = d == (temperature == 2 ? Divergence::forward_kl : Divergence::reverse_kl);
      if (quick && (temperature == 1 || !few)) continue;
      const DType dtype = turn % 3 ? DType::bfloat16 : DType::float16;
      Problem p = named("long rows T " + std::to_string(temperature), d, 4, 82 * 2048 + 9, dtype);
      p.teacher_dtype = turn % 4 == 3 ? DType::float16 : dtype;
      p.options.temperature = temperature;
      p.options.ce_weight = 0.5f;
      p.student_softcap = turn % 4 == 2 ? 4.0f : 0.0f;
      p.in_place = turn % 2 == 0;
      p.peak = 20;
      ++turn;
      out.push_back(p);
    }
  Problem p = named("a long row over threads", Divergence::symmetric_kl, 1, 4 * 82 * 2048 + 9, DType::bfloat16);
  p.options.ce_weight = 0.5f;
  p.peak = 20;
  out.push_back(p);
}

// Sparse teachers: few and many named columns, at the ends of vectors and blocks; rows apart, and one over threads.
void add_sparse(std::vector<Problem>& out, bool quick) {
  using fastkd::Tail;
  const float temperatures[] = {2, 1, 3, 0.7f};
  const int64_t widths[] = {1, 9, 17, 130, 2049, 4203, 70001};
  int turn = 0;
  for (Divergence d : kDivergences)
    for (Tail tail : {Tail::bucket, Tail::renormalize, Tail::sampled})
      for (int64_t columns : widths) {
        const bool reverse = d == Divergence::reverse_kl || d == Divergence::symmetric_kl;
        if (tail == Tail::renormalize && reverse) continue;
        if (tail == Tail::sampled && d != Divergence::forward_kl) continue;
        ++turn;
        if (columns == 70001 && quick && turn % 4) continue;
        Problem p = named("sparse tail " + std::to_string(static_cast<int>(tail)), d, columns > 9999 ? 1 : 5, columns,
                          kDTypes[turn % 3]);
        p.tail = tail;
        p.k = columns < 20 ? (columns + 1) / 2 : 40;
        if (columns == 130) p.k = turn % 2 ? 130 : 1;
        p.options.temperature = temperatures[turn % 4];
        p.options.ce_weight = turn % 5 ? 0.6f : 0.0f;
        p.options.label_smoothing = turn % 5 == 1 ? 0.1f : 0.0f;
        p.options.z_loss = turn % 5 == 2 ? 0.01f : 0.0f;
        p.options.kd_weight = 1.2f;
        p.stats = turn % 2 == 0;
        p.in_place = turn % 3 == 0;
        p.weights = turn % 4 == 1;
        p.offset = turn % 5;
        p.stride_gap = turn % 3 * 3;
        p.student_softcap = turn % 7 == 3 ? 6.0f : 0.0f;
        p.peak = turn % 4 == 2 ? 12 : 0;
        p.upstream = turn % 6 == 5 ? -1.5 : 1;
        p.reduction = turn % 6 == 5 ? fastkd::Reduction::none : fastkd::Reduction::mean;
        out.push_back(p);
      }
  // of the first row, one named column holds all but 1e-6 of the teacher; or all but e^-90 of the student
  Problem p = named("sparse, little left", Divergence::reverse_kl, 3, 2049, DType::float32);
  p.k = 40;
  p.options.temperature = 1;
  p.peak = 25;
  out.push_back(p);
  p = named("sparse, a student far from the rest", Divergence::forward_kl, 3, 2049, DType::float32);
  p.k = 40;
  p.options.temperature = 1;
  p.student_peak = 110;
  out.push_back(p);
}

}  // namespace

std::vector<Problem> all_problems(bool quick) {
  std::vector<Problem> out;
  add_widths(out, quick);
  add_options(out);
  add_values(out);
  add_parallel(out, quick);
  add_long_rows(out, quick);
  add_sparse(out, quick);
  out.push_back(named("no rows", Divergence::forward_kl, 0, 9, DType::float32));
  return out;
}

}  // namespace harness
