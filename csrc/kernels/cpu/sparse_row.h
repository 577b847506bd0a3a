// One row with a sparse teacher: a sweep of the student, the named columns by hand, the gradient. Blocks as in
// row_kernel.h, so that one thread may do the whole row or several share it, with the same bits.
#pragma once

#include "../sparse_params.h"
#include "row_kernel.h"

namespace fastkd {
namespace {

struct SparseJob {
  const LossParams& params;
  int64_t n;
  RowOptions options;
  Softening softening;
  Hard hard;
  const char* student;
  char* gradient;  // null: the value alone
  float label_logit = 0;
  SparseRow teacher;
  SparseScratch scratch;
  StudentPiece rest;
  GradientCoefficients coefficients;

  SparseJob(const LossParams& p, int64_t row_index, const SparseRow& sparse, const SparseScratch& s)
      : params(p),
        n(row_index),
        options(p.options),
        student(p.student.row(n)),
        gradient(p.gradient.data ? p.gradient.row(n) : nullptr),
        teacher(sparse),
        scratch(s) {
    if (p.temperatures) options.temperature = p.temperatures[n];
    softening = {options.temperature, kLog2e / options.temperature};
    hard = hard_source(options.temperature, p.needs_hard());
    if (p.needs_hard()) label_logit = read_column(student, p.student.dtype, p.labels[n], p.student_softcap);
  }

  int columns_of(int64_t block) const {
    const int64_t left = params.columns - block * kBlock;
    return left < kBlock ? static_cast<int>(left) : kBlock;
  }
  const char* student_at(int64_t block) const { return student + block * kBlock * size_of(params.student.dtype); }
  char* gradient_at(int64_t block) const { return gradient + block * kBlock * size_of(params.gradient.dtype); }

  // Whether a block's fp32 numbers can stand in the gradient's own memory.
  bool fits_gradient(int64_t block) const {
    return gradient && params.gradient.dtype == DType::float32 && columns_of(block) % kLanes == 0;
  }
  // A softcap needs the student's logits once more for its slope: they must survive an in-place call.
  float* exp_at(int64_t block) const {
    const bool in_gradient = fits_gradient(block) && params.student_softcap == 0;
    return in_gradient ? reinterpret_cast<float*>(gradient_at(block)) : scratch.exponentials + block * kBlock;
  }

  // The named columns of a block: first and one behind the last.
  NamedColumn* named_from(int64_t column) const {
    NamedColumn* first = teacher.named;
    for (int64_t left = teacher.count; left > 0;) {
      const int64_t half = left / 2;
      const bool before = first[half].column < column;
      first = before ? first + half + 1 : first;
      left = before ? left - half - 1 : half;
    }
    return first;
  }
};

// Exponentials of a block's rest and their sums. kKeep: for the gradient.
template <Hard kHard, bool kKeep>
void student_sweep(const float* logits, int n, Exponent<Vec> exponent, float temperature, Stream next, float* out,
                   float* out_hard, StudentPiece& piece) {
  Vec sum(0.0f), sum_hard(0.0f);
  const Vec t(temperature);
  const int power = static_cast<int>(temperature);
  for (int i = 0; i < n; i += kLanes) {
    next.fetch(i);
    const Vec y = exponent(Vec::load(logits + i)), e = exp2(y);
    sum += e;
    if constexpr (kKeep) e.store(out + i);
    if constexpr (kHard == Hard::square) sum_hard += e * e;
    if constexpr (kHard == Hard::power || kHard == Hard::own) {
      Vec hard = e;
      if constexpr (kHard == Hard::own) {
        hard = exp2(t * y);
      } else {
        for (int k = 1; k < power; ++k) hard = hard * e;
      }
      if constexpr (kKeep) hard.store(out_hard + i);
      sum_hard += hard;
    }
  }
  piece.sum = sum_lanes(sum);
  piece.sum_hard = kHard == Hard::none ? piece.sum : sum_lanes(sum_hard);
}

template <bool kKeep>
FASTKD_FN void student_sweep_of(Hard hard, const float* logits, int n, Exponent<Vec> exponent, float temperature,
                                Stream next, float* out, float* out_hard, StudentPiece& piece) {
  switch (hard) {
    case Hard::none:
      return student_sweep<Hard::none, kKeep>(logits, n, exponent, temperature, next, out, out_hard, piece);
    case Hard::square:
      return student_sweep<Hard::square, kKeep>(logits, n, exponent, temperature, next, out, out_hard, piece);
    case Hard::power:
      return student_sweep<Hard::power, kKeep>(logits, n, exponent, temperature, next, out, out_hard, piece);
    case Hard::own:
      return student_sweep<Hard::own, kKeep>(logits, n, exponent, temperature, next, out, out_hard, piece);
  }
}

// Takes the named columns' logits out of the block and masks them; returns the largest of what is left.
float take_named(const SparseJob& job, int64_t block, float* logits, float largest) {
  const int64_t first_column = block * kBlock;
  NamedColumn *const first = job.named_from(first_column), *const last = job.named_from(first_column + kBlock);
  bool was_largest = false;
  for (NamedColumn* c = first; c != last; ++c) {
    float& logit = logits[c->column - first_column];
    c->logit = logit;
    was_largest = was_largest || logit == largest;
    logit = minus_infinity();
  }
  if (!was_largest) return largest;
  Vec rest(minus_infinity());
  for (int i = 0; i < padded(job.columns_of(block)); i += kLanes) rest = max(Vec::load(logits + i), rest);
  return max_lanes(rest);
}

void sparse_first_step(SparseJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  alignas(64) float forgotten[2][kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int columns = job.columns_of(block), n = padded(columns);
    float* out = job.gradient ? job.exp_at(block) : forgotten[0];
    float* out_hard = job.gradient ? job.scratch.exp_hard + block * kBlock : forgotten[1];
    const bool named = job.named_from(block * kBlock) != job.named_from((block + 1) * kBlock);
    Block s;
    if (named) {  // in memory of our own, where columns can be masked
      s = {out, load_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, out)};
    } else {
      s = read_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, out);
    }
    StudentPiece& piece = job.scratch.pieces[block];
    piece = StudentPiece{};
    piece.columns = static_cast<float>(columns);
    piece.peak = s.largest;
    if (job.options.label_smoothing != 0) {
      const Exponent<float> exponent = job.softening.relative_to(s.largest);
      piece.linear = linear_sum(s.logits, columns, lanes_of(exponent));
    }
    if (p.stats) piece.top = find_top(s.logits, columns, s.largest, block * kBlock);
    piece.largest = named ? take_named(job, block, out, s.largest) : s.largest;
    const Exponent<Vec> exponent = lanes_of(job.softening.relative_to(piece.largest));
    if (p.stats) piece.entropy = entropy_sum(s.logits, n, exponent);
    const Stream next = stream(job.student_at(block + 1), p.student.dtype);
    const float t = job.options.temperature;
    if (job.gradient) {
      student_sweep_of<true>(job.hard, s.logits, n, exponent, t, next, out, out_hard, piece);
    } else {
      student_sweep_of<false>(job.hard, s.logits, n, exponent, t, next, out, out_hard, piece);
    }
  }
}

void sparse_finish(SparseJob& job) {
  const LossParams& p = job.params;
  job.rest = job.scratch.pieces[0];
  for (int64_t block = 1; block < blocks_of(p.columns); ++block)
    job.rest.merge(job.scratch.pieces[block], job.softening);
  const RowInputs inputs{p.needs_hard(), job.label_logit, p.weight(job.n), p.gradient_scale, job.gradient != nullptr};
  const RowOutcome out = finish_sparse_row(job.options, job.softening, job.rest, job.teacher.tail, job.teacher.named,
                                           job.teacher.count, inputs, p.stats != nullptr);
  p.row_loss[job.n] = out.loss;
  if (p.stats) p.write_stats(job.n, out, [](float* to, float x) { *to = x; });
  job.coefficients = out.coefficients;
}

// The rest's gradient from its exponentials.
template <Hard kHard>
void rest_sweep(const float* exp_s, const float* exp_hard, int n, float student, float hard, float constant,
                Stream next, float* gradient) {
  const Vec of_e(student), of_hard(hard), c(constant);
  for (int i = 0; i < n; i += kLanes) {
    next.fetch(i);
    const Vec e = Vec::load(exp_s + i);
    Vec d = of_e * e + c;
    if constexpr (kHard == Hard::square) d = (of_hard * e + of_e) * e + c;
    if constexpr (kHard == Hard::power) d = of_hard * Vec::load(exp_hard + i) + d;
    d.store(gradient + i);
  }
}

FASTKD_FN void rest_sweep_of(const SparseJob& job, int64_t block, float* gradient) {
  const GradientCoefficients& c = job.coefficients;
  const float shift = job.softening.shift(job.scratch.pieces[block].largest, job.rest.largest);
  const float student = c.student * exp2(shift), hard = c.hard * exp2(job.options.temperature * shift);
  const float *exp_s = job.exp_at(block), *exp_hard = job.scratch.exp_hard + block * kBlock;
  const int n = padded(job.columns_of(block));
  const Stream next = stream(job.gradient_at(block - 1), job.params.gradient.dtype);
  const Hard source = job.options.ce_weight != 0 ? job.hard : Hard::none;
  if (source == Hard::square) {
    return rest_sweep<Hard::square>(exp_s, exp_hard, n, student, hard, c.constant, next, gradient);
  }
  if (source != Hard::none) {
    return rest_sweep<Hard::power>(exp_s, exp_hard, n, student, hard, c.constant, next, gradient);
  }
  // T = 1: one exponential serves both
  rest_sweep<Hard::none>(exp_s, exp_hard, n, student + hard, 0, c.constant, next, gradient);
}

// Backwards: what the first step touched last is still in the cache.
void sparse_last_step(SparseJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  const int64_t label = p.needs_hard() ? p.labels[job.n] : -1;
  alignas(64) float converted[kBlock];
  for (int64_t block = end - 1; block >= begin; --block) {
    const int columns = job.columns_of(block);
    const int64_t first_column = block * kBlock;
    float* gradient = job.fits_gradient(block) && p.student_softcap == 0
                          ? reinterpret_cast<float*>(job.gradient_at(block))
                          : converted;
    rest_sweep_of(job, block, gradient);
    const NamedColumn* last = job.named_from(first_column + kBlock);
    for (const NamedColumn* c = job.named_from(first_column); c != last; ++c)
      gradient[c->column - first_column] = c->gradient;
    if (label >= first_column && label < first_column + columns)
      gradient[label - first_column] += job.coefficients.label;
    if (p.student_softcap != 0) {
      float capped[kBlock];
      load_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, capped);
      apply_softcap_gradient(capped, padded(columns), p.student_softcap, gradient);
    }
    if (gradient == converted) store_block(gradient, columns, p.gradient.dtype, job.gradient_at(block));
  }
}

// Runs one step on the calling thread, or on all of the executor's.
void run_sparse_step(SparseJob& job, const Executor* executor, void (*step)(SparseJob&, int64_t, int64_t)) {
  const int64_t blocks = blocks_of(job.params.columns);
  if (!executor) return step(job, 0, blocks);
  struct Context {
    SparseJob& job;
    void (*step)(SparseJob&, int64_t, int64_t);
  } context{job, step};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    static_cast<Context*>(c)->step(static_cast<Context*>(c)->job, begin, end);
  };
  executor->run(blocks, 1, body, &context);
}

void run_sparse_row(const LossParams& p, int64_t n, const SparseRow& teacher, const SparseScratch& scratch,
                    const Executor* executor) {
  SparseJob job(p, n, teacher, scratch);
  run_sparse_step(job, executor, sparse_first_step);
  sparse_finish(job);
  if (job.gradient) run_sparse_step(job, executor, sparse_last_step);
}

}  // namespace
}  // namespace fastkd
