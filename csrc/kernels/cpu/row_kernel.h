// One row from logits to loss and gradient. A row is a list of blocks; each step works on a range of blocks, so that
// one thread may do the whole row or several share it, with the same bits.
#pragma once

#include "convert.h"
#include "isa.h"
#include "sweeps.h"

namespace fastkd {
namespace {

// Blocks of a thread's part of a row that stay in a second-level cache of 2 MB: 12 bytes a column for 16-bit logits.
constexpr int64_t kCachedBlocks = 80;
constexpr int64_t kKeptTail = 24;  // of a longer part; more push each other out

// A row under way.
struct RowJob {
  const LossParams& params;
  int64_t n;
  RowOptions options;
  Softening softening;
  const char *student, *teacher;
  char* gradient;         // null: the value alone
  float label_logit = 0;  // read before anything is overwritten
  Hard hard;
  bool exp_in_gradient;     // see exp_s_at
  bool keeps_exponentials;  // a later sweep needs them; else each block's are forgotten after its sums
  RowScratch scratch;
  Piece row;
  TermSums terms;
  GradientCoefficients coefficients;

  RowJob(const LossParams& p, int64_t row_index, const RowScratch& s)
      : params(p),
        n(row_index),
        options(p.options),
        student(p.student.row(n)),
        teacher(p.teacher.row(n)),
        gradient(p.gradient.data ? p.gradient.row(n) : nullptr),
        scratch(s.apart_from(teacher)) {
    if (p.temperatures) options.temperature = p.temperatures[n];
    softening = {options.temperature, kLog2e / options.temperature};
    hard = hard_source(options.temperature, p.needs_hard());
    if (p.needs_hard()) label_logit = read_column(student, p.student.dtype, p.labels[n], p.student_softcap);
    exp_in_gradient = gradient && p.gradient.dtype == DType::float32 && p.student_softcap == 0;
    keeps_exponentials = gradient || !is_mixed_kl(options.divergence);
  }

  int columns_of(int64_t block) const {
    const int64_t left = params.columns - block * kBlock;
    return left < kBlock ? static_cast<int>(left) : kBlock;
  }
  const char* student_at(int64_t block) const { return student + block * kBlock * size_of(params.student.dtype); }
  const char* teacher_at(int64_t block) const { return teacher + block * kBlock * size_of(params.teacher.dtype); }
  char* gradient_at(int64_t block) const { return gradient + block * kBlock * size_of(params.gradient.dtype); }

  // The hard exponential that the gradient needs.
  Hard gradient_hard() const { return options.ce_weight != 0 ? hard : Hard::none; }

  // The student's exponentials wait in the gradient's own memory where they fit: fewer lines in the cache.
  bool exp_s_is_gradient(int64_t block) const { return exp_in_gradient && columns_of(block) % kLanes == 0; }
  float* exp_s_at(int64_t block) const {
    return exp_s_is_gradient(block) ? reinterpret_cast<float*>(gradient_at(block)) : scratch.exp_s + block * kBlock;
  }
  BlockView view(int64_t block) const {
    const int64_t at = block * kBlock;
    BlockView v{};
    v.n = padded(columns_of(block));
    v.exp_s = exp_s_at(block);
    v.exp_t = scratch.exp_t + at;
    v.ratio = scratch.ratio + at;
    v.exp_hard = scratch.exp_hard + at;
    return v;
  }
};

FASTKD_FN Stream stream(const char* next, DType dtype) { return {next, kLanes * static_cast<int>(size_of(dtype))}; }
// Always as many bytes beyond a block: the next one in fp32, the one after that in 16 bits, where one is too near.
FASTKD_FN Stream ahead(const char* block, DType dtype) { return stream(block + kBlock * sizeof(float), dtype); }
FASTKD_FN Exponent<Vec> lanes_of(const Exponent<float>& e) { return {Vec(e.reference), Vec(e.slope)}; }

// Whether a block's exponentials wait in memory for the last step, which runs backwards; else it makes them again from
// the logits. begin, end: what the calling thread does in both steps. Reading them back from beyond the second-level
// cache takes longer than making them again where the logits are half as wide; a bounded tail is still in the cache.
FASTKD_FN bool waits_for_last_step(const RowJob& job, int64_t block, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  if (!job.keeps_exponentials || !is_mixed_kl(job.options.divergence)) return job.keeps_exponentials;
  const bool wide = p.student.dtype == DType::float32 || p.teacher.dtype == DType::float32;
  return wide || end - begin <= kCachedBlocks || end - block <= kKeptTail;
}

void first_step(RowJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  alignas(64) float forgotten[4][kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int columns = job.columns_of(block);
    BlockView view = job.view(block);
    job.scratch.kept[block] = waits_for_last_step(job, block, begin, end);
    if (!job.scratch.kept[block]) view.keep_in(forgotten);
    const Block s = read_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, view.exp_s);
    const Block t = read_block(job.teacher_at(block), p.teacher.dtype, columns, p.teacher_softcap, view.exp_t);
    view.student = s.logits;
    view.teacher = t.logits;
    view.next_s = ahead(job.student_at(block), p.student.dtype);
    view.next_t = ahead(job.teacher_at(block), p.teacher.dtype);

    Piece& piece = job.scratch.pieces[block];
    piece = Piece{};
    piece.columns = static_cast<float>(columns);
    piece.largest_s = s.largest;
    piece.largest_t = t.largest;
    const Exponent<Vec> exponent_s = lanes_of(job.softening.relative_to(s.largest));
    const Exponent<Vec> exponent_t = lanes_of(job.softening.relative_to(t.largest));
    if (job.options.label_smoothing != 0) piece.linear_s = linear_sum(s.logits, columns, exponent_s);
    if (p.stats) {
      piece.entropy_s = entropy_sum(s.logits, view.n, exponent_s);
      piece.entropy_t = entropy_sum(t.logits, view.n, exponent_t);
      piece.top_s = find_top(s.logits, columns, s.largest, block * kBlock);
      piece.top_t = find_top(t.logits, columns, t.largest, block * kBlock);
    }
    first_sweep_of(job.options.divergence, job.hard, view, exponent_s, exponent_t, job.options.temperature, piece);
  }
}

void merge_first_step(RowJob& job) {
  job.row = job.scratch.pieces[0];
  for (int64_t block = 1; block < blocks_of(job.params.columns); ++block)
    job.row.merge(job.scratch.pieces[block], job.softening);
}

FASTKD_FN BlockScales block_scales(const RowJob& job, const Piece& piece) {
  const float shift_s = job.softening.shift(piece.largest_s, job.row.largest_s);
  const float shift_t = job.softening.shift(piece.largest_t, job.row.largest_t);
  return {exp2(shift_s), exp2(shift_t), exp2(job.options.temperature * shift_s), shift_t - shift_s};
}

void second_step(RowJob& job, int64_t begin, int64_t end) {
  const Denominators z(job.row);
  // backwards: what the first step touched last is still in the cache
  for (int64_t block = end - 1; block >= begin; --block) {
    BlockScales scales = block_scales(job, job.scratch.pieces[block]);
    scales.student /= job.row.sum_s;
    scales.teacher /= job.row.sum_t;
    scales.log2_ratio += z.log2_s - z.log2_t;
    job.scratch.terms[block] =
        term_sweep_of(job.options.divergence, job.view(block), scales, job.options.beta, job.options.beta_rest);
  }
}

void merge_second_step(RowJob& job) {
  job.terms = TermSums{};
  for (int64_t block = 0; block < blocks_of(job.params.columns); ++block) job.terms.merge(job.scratch.terms[block]);
}

// The row's loss, statistics and gradient coefficients.
void finish_job(RowJob& job) {
  const LossParams& p = job.params;
  const RowInputs inputs{p.needs_hard(), job.label_logit, p.weight(job.n), p.gradient_scale, job.gradient != nullptr};
  const RowOutcome out = finish_row(job.options, job.softening, job.row, job.terms, inputs);
  p.row_loss[job.n] = out.loss;
  if (p.stats) p.write_stats(job.n, out, [](float* to, float x) { *to = x; });
  job.coefficients = out.coefficients;
}

FASTKD_FN BlockCoefficients block_coefficients(const RowJob& job, int64_t block) {
  const GradientCoefficients& c = job.coefficients;
  const BlockScales scales = block_scales(job, job.scratch.pieces[block]);
  const bool mixed = is_mixed_kl(job.options.divergence);
  BlockCoefficients b{c.student * scales.student, c.ratio * scales.student,
                      mixed ? c.teacher * scales.teacher : c.dlogq, c.hard * scales.hard, c.constant};
  // a block whose exponentials vanish beside the row's has no part in the gradient, however large its ratios
  if (b.ratio != 0) b.student += b.ratio * scales.log2_ratio;
  return b;
}

// Where the last step finds a block: its kept exponentials, or the logits to make them from again.
FASTKD_FN void fetch_for_last_step(const RowJob& job, int64_t next, BlockView& view) {
  const BlockView ahead = job.view(next);
  if (job.scratch.kept[next]) {
    view.next_s = stream(reinterpret_cast<const char*>(ahead.exp_s), DType::float32);
    view.next_t = stream(reinterpret_cast<const char*>(ahead.exp_t), DType::float32);
  } else {
    view.next_s = stream(job.student_at(next), job.params.student.dtype);
    view.next_t = stream(job.teacher_at(next), job.params.teacher.dtype);
  }
  view.next_d = stream(job.gradient_at(next), job.params.gradient.dtype);
  if (view.next_d.next == view.next_s.next) view.next_d = {view.next_d.next, 0};  // once is enough
}

// The same from logits that are n (padded) columns of one dtype, without a softcap.
template <DType kDType>
void sweep_remade(const RowJob& job, int64_t block, const BlockView& view, const char* student, const char* teacher,
                  float* gradient) {
  const Piece& piece = job.scratch.pieces[block];
  const float temperature = job.options.temperature;
  const RemadeColumns<kDType> columns{student,
                                      teacher,
                                      lanes_of(job.softening.relative_to(piece.largest_s)),
                                      lanes_of(job.softening.relative_to(piece.largest_t)),
                                      Vec(temperature),
                                      job.hard == Hard::power ? static_cast<int>(temperature) : 0};
  gradient_sweep_of(job.gradient_hard(), view, columns, block_coefficients(job, block), gradient);
}

// The gradient of one block, before the label's part and the softcap's.
void sweep_gradient(const RowJob& job, int64_t block, const BlockView& view, float* gradient) {
  if (job.scratch.kept[block]) {
    return gradient_sweep_of(job.gradient_hard(), view, KeptColumns{view}, block_coefficients(job, block), gradient);
  }
  const LossParams& p = job.params;
  const int n = job.columns_of(block);
  const char *student = job.student_at(block), *teacher = job.teacher_at(block);
  const bool capped = p.student_softcap != 0 || p.teacher_softcap != 0;
  if (p.student.dtype == p.teacher.dtype && !capped && n % kLanes == 0) {
    if (p.student.dtype == DType::bfloat16) {
      return sweep_remade<DType::bfloat16>(job, block, view, student, teacher, gradient);
    }
    if (p.student.dtype == DType::float16) {
      return sweep_remade<DType::float16>(job, block, view, student, teacher, gradient);
    }
    return sweep_remade<DType::float32>(job, block, view, student, teacher, gradient);
  }
  alignas(64) float s[kBlock], t[kBlock];
  load_block(student, p.student.dtype, n, p.student_softcap, s);
  load_block(teacher, p.teacher.dtype, n, p.teacher_softcap, t);
  sweep_remade<DType::float32>(job, block, view, reinterpret_cast<const char*>(s), reinterpret_cast<const char*>(t),
                               gradient);
}

void last_step(RowJob& job, int64_t begin, int64_t end) {
  const LossParams& p = job.params;
  const int64_t label = p.needs_hard() ? p.labels[job.n] : -1;
  float buffer[kBlock];
  // against the direction of the step before, for the same reason as there
  const int64_t step = is_mixed_kl(job.options.divergence) ? -1 : 1;
  for (int64_t block = step > 0 ? begin : end - 1; block >= begin && block < end; block += step) {
    const int columns = job.columns_of(block);
    BlockView view = job.view(block);
    if (block + step >= begin && block + step < end) fetch_for_last_step(job, block + step, view);
    // over its exponentials, where they wait in the gradient's memory
    float* gradient = job.exp_s_is_gradient(block) ? view.exp_s : buffer;
    sweep_gradient(job, block, view, gradient);
    const int64_t label_at = label - block * kBlock;
    if (label_at >= 0 && label_at < columns) gradient[label_at] += job.coefficients.label;
    if (p.student_softcap != 0) {
      float capped[kBlock];
      load_block(job.student_at(block), p.student.dtype, columns, p.student_softcap, capped);
      apply_softcap_gradient(capped, view.n, p.student_softcap, gradient);
    }
    if (gradient == buffer) store_block(gradient, columns, p.gradient.dtype, job.gradient_at(block));
  }
}

// A step on all blocks of a row: by the threads of the executor, or by the calling one where there is none.
void run_step(RowJob& job, const Executor* executor, void (*step)(RowJob&, int64_t, int64_t)) {
  const int64_t blocks = blocks_of(job.params.columns);
  if (!executor) return step(job, 0, blocks);
  struct Context {
    RowJob& job;
    void (*step)(RowJob&, int64_t, int64_t);
  } context{job, step};
  const auto body = [](void* c, int64_t begin, int64_t end) {
    static_cast<Context*>(c)->step(static_cast<Context*>(c)->job, begin, end);
  };
  executor->run(blocks, 1, body, &context);
}

// Gradient columns beyond the shared vocabulary, or all of an ignored row.
void zero_gradient(const LossParams& p, int64_t n, int64_t first_column) {
  if (!p.gradient.data) return;
  const int64_t size = size_of(p.gradient.dtype);
  std::memset(p.gradient.row(n) + first_column * size, 0,
              static_cast<size_t>((p.gradient_columns - first_column) * size));
}

void ignore_row(const LossParams& p, int64_t n) {
  p.row_loss[n] = 0;
  if (p.stats)
    for (int i = 0; i < 5; ++i) p.stats[i * p.rows + n] = 0;
  zero_gradient(p, n, 0);
}

}  // namespace
}  // namespace fastkd
