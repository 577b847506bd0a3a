#include "plan.h"

#include <algorithm>

#include "limits.h"

namespace fastkd {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kColumns = 4;             // of a place that is no chunk of vectors
constexpr int64_t kWarpColumns = 1024;  // up to here one warp a row
constexpr int kReserved = 1024;      // bytes of a multiprocessor's shared memory that each block costs besides its own
constexpr int kThreadsWanted = 768;  // a multiprocessor's resident threads, over its blocks
constexpr int kLeastThreads = 128;
constexpr int kStreamChunks = 2;  // chunks that a streaming thread should have at least
constexpr int kMostSplits = 256;
constexpr int kWaves = 2;  // blocks a multiprocessor that a streaming grid should at least have

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

int width_of(DType student, DType teacher) { return student == DType::float32 || teacher == DType::float32 ? 4 : 8; }

// Bytes of a team's shared memory: its scratch and its chunks.
int64_t team_bytes(const Problem& p, int64_t scratch, int64_t chunks, int width) {
  return scratch + chunk_bytes_of(p, chunks, width);
}
int block_scratch(const Problem& p) { return p.sparse ? kSparseScratchBytes : kBlockScratchBytes; }

bool fits_a_warp(const Problem& p, const GpuLimits& gpu, int width) {
  return team_bytes(p, kWarpScratchBytes, p.columns / width, width) <= gpu.shared_per_block;
}

Plan plan_warps(const Problem& p, const GpuLimits& gpu, Plan plan) {
  plan.variant = Variant::warp;
  plan.team_chunks = static_cast<int>(p.columns / plan.access.width);
  plan.team_bytes = static_cast<int>(team_bytes(p, kWarpScratchBytes, plan.team_chunks, plan.access.width));
  const int64_t wanted = kWarpBlockThreads / kWarpThreads;
  const int64_t spread = divide_up(p.rows, gpu.multiprocessors);  // few rows: a block with one rather than none
  const int64_t fitting = gpu.shared_per_block / plan.team_bytes;
  plan.rows_per_block = static_cast<int>(std::max<int64_t>(1, std::min({wanted, spread, fitting})));
  plan.threads = plan.rows_per_block * kWarpThreads;
  plan.blocks = divide_up(p.rows, plan.rows_per_block);
  plan.shared_bytes = plan.rows_per_block * plan.team_bytes;
  plan.sweeps = 1;
  plan.reason = "a row fits one warp's share of shared memory";
  return plan;
}

// Bytes of a block that holds 1 / cluster of both rows.
int64_t resident_bytes(const Problem& p, int width, int cluster, int* chunks) {
  *chunks = static_cast<int>(divide_up(p.columns / width, cluster));
  return team_bytes(p, block_scratch(p), *chunks, width);
}

// The smallest cluster, of `least` to `most` blocks, whose slices let `blocks` of them share a multiprocessor; 0: none
// does.
int cluster_for(const Problem& p, const GpuLimits& gpu, int width, int blocks, int least, int most) {
  for (int cluster = least; cluster <= most; cluster *= 2) {
    int chunks = 0;
    const int64_t bytes = resident_bytes(p, width, cluster, &chunks);
    if (bytes <= gpu.shared_per_block && blocks * (bytes + kReserved) <= gpu.shared_per_multiprocessor) return cluster;
  }
  return 0;
}

Plan plan_resident(const Problem& p, const GpuLimits& gpu, int cluster, Plan plan) {
  plan.variant = cluster == 1 ? Variant::block : Variant::cluster;
  plan.cluster = cluster;
  plan.shared_bytes = static_cast<int>(resident_bytes(p, plan.access.width, cluster, &plan.team_chunks));
  plan.team_bytes = plan.shared_bytes;
  const int64_t together = std::max<int64_t>(1, gpu.shared_per_multiprocessor / (plan.shared_bytes + kReserved));
  const int64_t wanted = round_up(divide_up(kThreadsWanted, std::min<int64_t>(together, 6)), kWarpThreads);
  const int64_t useful = round_up(std::max(plan.team_chunks, 1), kWarpThreads);
  plan.threads = static_cast<int>(std::min<int64_t>(
      {std::max<int64_t>(wanted, kLeastThreads), std::max<int64_t>(useful, kWarpThreads), kResidentThreads}));
  plan.blocks = p.rows * cluster;
  plan.bulk = brings_in_bulk(gpu, p.student, p.teacher);
  plan.sweeps = 1;
  plan.reason = cluster == 1 ? "a row fits the shared memory of a block"
                             : "a row fits the shared memory of a cluster of " + std::to_string(cluster) + " blocks";
  plan.reason += ", " + std::to_string(together) + " a multiprocessor";
  return plan;
}

Plan plan_streaming(const Problem& p, const GpuLimits& gpu, Plan plan, const std::string& reason) {
  const Split split = split_rows(p.rows, p.columns, plan.access.width, gpu);
  plan.variant = Variant::streaming;
  plan.splits = split.splits;
  plan.shared_bytes = block_scratch(p);
  if (p.sparse && p.aligned) {  // a byte a chunk says which columns are named
    const int64_t chunks = p.columns / plan.access.width, fitting = gpu.shared_per_block - plan.shared_bytes - 16;
    plan.splits = static_cast<int>(std::max<int64_t>(plan.splits, divide_up(chunks, fitting)));
    plan.shared_bytes += static_cast<int>(round_up(divide_up(chunks, plan.splits), 16));
  }
  plan.threads = split.threads;
  plan.blocks = p.rows * plan.splits;
  plan.sweeps = (p.mixed_kl || p.sparse ? 1 : 2) + (p.with_gradient ? 1 : 0);
  plan.reason = reason;
  return plan;
}

// Whether row n of both begins at the same column between two boundaries, whatever n. b's rows must be addressed on a's
// two levels: it has the same ones, or one stride throughout.
bool same_phase(const Rows& a, const Rows& b, int64_t rows, int64_t width) {
  const auto column = [](const Rows& r) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.data)) / size_of(r.dtype);
  };
  const auto same = [&](int64_t x, int64_t y) { return (x - y) % width == 0; };
  if (!same(column(a), column(b)) || !same(a.inner_stride, b.inner_stride)) return false;
  if (rows <= a.inner && rows <= b.inner) return true;
  const bool one_stride = rows <= b.inner || same(b.outer_stride, b.inner * b.inner_stride);
  if (a.inner != b.inner && !one_stride) return false;
  return same(a.outer_stride, a.inner == b.inner && rows > b.inner ? b.outer_stride : a.inner * b.inner_stride);
}

}  // namespace

int64_t chunk_bytes_of(const Problem& p, int64_t chunks, int width) {
  const int64_t of_student = round_up(chunks * width * size_of(p.student), 16);  // on a 16-byte boundary, like the next
  return of_student + round_up(p.sparse ? chunks : chunks * width * size_of(p.teacher), 16);
}

Access access_of(const Rows& student, const Rows& teacher, const Rows& gradient, int64_t rows) {
  Access access;
  access.width = width_of(student.dtype, teacher.dtype);
  access.vectors = true;
  for (const Rows* other : {&teacher, &gradient}) {
    if (!other->data) continue;
    const int width = access.width;
    const bool same = same_phase(student, *other, rows, width) || same_phase(*other, student, rows, width);
    access.vectors = access.vectors && same;
  }
  if (!access.vectors) access.width = kColumns;
  return access;
}

bool brings_in_bulk(const GpuLimits& gpu, DType student, DType teacher) {
  return gpu.arch >= 90 && size_of(student) == size_of(teacher);
}

Split split_rows(int64_t rows, int64_t columns, int width, const GpuLimits& gpu) {
  const int64_t chunks = std::max<int64_t>(1, columns / width);
  Split split;
  split.threads =
      static_cast<int>(std::min<int64_t>(kStreamThreads, round_up(divide_up(chunks, kStreamChunks), kWarpThreads)));
  const int64_t wanted = divide_up(int64_t{kWaves} * gpu.multiprocessors, std::max<int64_t>(rows, 1));
  const int64_t useful = divide_up(chunks, int64_t{split.threads} * kStreamChunks);
  split.splits = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({wanted, useful, kMostSplits})));
  return split;
}

Problem problem_of(const LossParams& p, bool sparse) {
  const Access access = access_of(p.student, p.teacher, p.gradient, p.rows);
  return {p.rows,
          p.columns,
          p.student.dtype,
          p.teacher.dtype,
          is_mixed_kl(p.options.divergence),
          p.gradient.data != nullptr,
          access.vectors,
          sparse};
}

Plan plan_call(const LossParams& p, const GpuLimits& gpu, std::optional<Variant> wanted) {
  return plan_loss(problem_of(p, false), gpu, wanted);
}

Plan plan_sparse(LossParams p, const GpuLimits& gpu, std::optional<Variant> wanted) {
  p.teacher = p.student;
  return plan_loss(problem_of(p, true), gpu, wanted == Variant::warp ? std::nullopt : wanted);
}

Plan plan_shard(const LossParams& p, const GpuLimits& gpu) {
  Problem problem = problem_of(p, false);
  problem.shard = true;
  return plan_loss(problem, gpu);
}

Plan plan_loss(const Problem& p, const GpuLimits& gpu, std::optional<Variant> wanted) {
  Plan plan;
  plan.access = {p.aligned ? width_of(p.student, p.teacher) : kColumns, p.aligned};
  if (p.shard) return plan_streaming(p, gpu, plan, "sums are exchanged between the sweeps of a row");
  if (!p.aligned)
    return plan_streaming(p, gpu, plan, "the tensors' rows begin at different places between two boundaries");
  if (wanted == Variant::streaming) return plan_streaming(p, gpu, plan, "asked for");
  const bool warp = p.sparse ? false
                    : wanted ? wanted == Variant::warp && fits_a_warp(p, gpu, plan.access.width)
                             : p.columns <= kWarpColumns;
  if (warp) return plan_warps(p, gpu, plan);
  const int most = wanted == Variant::block ? 1 : gpu.largest_cluster;
  const int least = wanted == Variant::cluster ? 2 : 1;
  int cluster = 0;
  for (int blocks = 3; blocks >= 1 && cluster == 0; --blocks)
    cluster = cluster_for(p, gpu, plan.access.width, blocks, least, most);
  if (cluster == 0) {
    return plan_streaming(p, gpu, plan,
                          most > 1 ? "a row is larger than the shared memory of a cluster"
                                   : "a row is larger than the shared memory of a block");
  }
  const bool fills = p.rows * cluster >= gpu.multiprocessors;
  const Split split = split_rows(p.rows, p.columns, plan.access.width, gpu);
  if (!wanted && !fills && split.splits > 2 * cluster)
    return plan_streaming(p, gpu, plan, "few rows: each is split over more blocks than a cluster has");
  return plan_resident(p, gpu, cluster, plan);
}

std::optional<Variant> variant_of(const std::string& name) {
  for (const Variant variant : {Variant::warp, Variant::block, Variant::cluster, Variant::streaming})
    if (name == name_of(variant)) return variant;
  return std::nullopt;
}

const char* name_of(Variant variant) {
  switch (variant) {
    case Variant::warp: return "warp";
    case Variant::block: return "block";
    case Variant::cluster: return "cluster";
    case Variant::streaming: return "streaming";
  }
  return "";
}

}  // namespace fastkd
