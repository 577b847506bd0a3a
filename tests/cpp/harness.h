// What the harness's parts share: problems of the torch-free kernel layer, their fp64 answers, and rows in memory with
// a page behind them that may not be touched.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/kernels/cpu/sparse_launch.h"

namespace harness {

// Logits as the kernels read them: rows in their dtype, each directly before a page without access, and the same
// values in fp64.
class GuardedRows {
 public:
  // row_stride >= columns, in elements; `offset` elements lie before the first row.
  GuardedRows(int64_t rows, int64_t columns, int64_t row_stride, int64_t offset, fastkd::DType dtype);
  ~GuardedRows();
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;

  void set(int64_t row, int64_t column, double value);
  double get(int64_t row, int64_t column) const;
  // Fills what lies between the rows with a pattern, or checks that it is still there.
  void mark_gaps();
  bool gaps_are_marked() const;
  fastkd::Rows rows() const;

 private:
  char* element(int64_t index) const { return first_ + index * fastkd::size_of(dtype_); }

  int64_t rows_, columns_, stride_;
  fastkd::DType dtype_;
  char* mapping_;
  size_t mapped_;
  char* first_;  // the first row
};

struct Problem {
  std::string name;
  int64_t rows = 3, student_columns = 17, teacher_columns = 17;
  int64_t stride_gap = 0, offset = 0;
  fastkd::DType student_dtype = fastkd::DType::float32, teacher_dtype = fastkd::DType::float32;
  fastkd::RowOptions options;
  fastkd::Reduction reduction = fastkd::Reduction::mean;
  float student_softcap = 0, teacher_softcap = 0;
  bool labels = true, weights = false, temperatures = false, stats = false, in_place = false;
  double peak = 0;                  // added to one column of each model
  double student_peak = 0;          // added to the same column of the student besides
  bool masked = false;              // some columns, and the first chunk of a long row, -inf in both
  bool teacher_masks_more = false;  // with `masked`: half of the columns in the teacher alone
  bool identical = false;           // teacher = student
  bool swapped = false;  // all logits 0 but one, in the first column of the student, the second of the teacher
  double upstream = 1;   // applied by the rescaling kernel
  int64_t k = 0;         // > 0: a sparse teacher of so many entries a row, taken from the dense one
  fastkd::Tail tail = fastkd::Tail::bucket;

  bool ties_are_exact() const { return identical || swapped; }
};

struct Row {
  std::vector<double> student, teacher;
  int64_t label;
  bool ignored;
  double weight, temperature;
  std::vector<int64_t> ids;      // (K), in no order; -1: no entry. May repeat for Tail::sampled
  std::vector<double> logprobs;  // (K), as they are stored
};

struct Answer {
  double loss = 0, loss_magnitude = 0;  // of the row, weighted, not divided
  double kd = 0, ce = 0, student_entropy = 0, teacher_entropy = 0, agreement = 0;
  int64_t top = 0;  // the student's
  std::vector<double> gradient, magnitude,
      slack;  // of the row's loss; slack: absolute, beside a tie of total variation
};

// fp64, from the formulas of DESIGN section 1; reference.cpp.
Answer answer_of(const Problem& problem, const Row& row);

// What a sparse problem computes of the divergence, added to `a`; sparse_reference.cpp. lq: log-softmax of the student.
void add_sparse_divergence(const Problem& problem, const Row& row, const std::vector<double>& lq, Answer& a);

// What both references are made of: one outcome's term, d term / d lq, what rounding can do to either, and what a tie
// in doubt can.
struct Term {
  double value, dlogq, size, slack = 0;
};
Term term_of(const Problem& problem, double lp, double lq);

// All problems: every divergence, dtype, option, odd widths, layouts. `quick`: the part that mutants are judged by.
std::vector<Problem> all_problems(bool quick);

// Runs one problem by the kernels on `threads` threads. Returns what was wrong, "" if nothing.
std::string run(const Problem& problem, int threads);

// The kernels between the products of the linear loss, likewise; products.cpp.
std::string run_products(const fastkd::Executor& executor);
std::string run_products(int threads);

}  // namespace harness
