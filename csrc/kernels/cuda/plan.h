// Launch arithmetic: which kernels compute a call, with how many blocks, threads and bytes of shared memory. Pure host
// functions of the shape and the device; nothing here asks a driver.
#pragma once

#include <optional>
#include <string>

#include "call.h"

namespace fastkd {

// What the arithmetic needs to know of a GPU.
struct GpuLimits {
  int arch = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int shared_per_block = 163 * 1024;           // bytes, opt-in
  int shared_per_multiprocessor = 164 * 1024;  // bytes
  int largest_cluster = 1;                     // blocks; 16 where the device takes such clusters, 8 or 1 elsewhere
};

enum class Variant { warp, block, cluster, streaming };

// The variant of a name; nothing where there is none of that name.
std::optional<Variant> variant_of(const std::string& name);
const char* name_of(Variant variant);

struct Plan {
  Variant variant = Variant::streaming;
  Access access;
  int threads = 0;       // a block
  int64_t blocks = 0;    // of the gradient's kernel
  int cluster = 1;       // blocks
  int splits = 1;        // streaming: blocks of a row
  int shared_bytes = 0;  // a block
  int team_bytes = 0, team_chunks = 0;
  int rows_per_block = 1;  // warp: teams of a block
  bool bulk = false;       // block, cluster: slices are brought by bulk copies
  int sweeps = 0;          // reads of both logits from global memory, with the gradient
  std::string reason;
};

// What of a call the plan depends on.
struct Problem {
  int64_t rows = 0, columns = 0;
  DType student = DType::float32, teacher = DType::float32;
  bool mixed_kl = true, with_gradient = true;
  bool aligned = true;  // rows of all tensors start at the same place between 16-byte boundaries
  bool sparse = false;  // the teacher names columns: no logits of it
  bool shard = false;   // columns of one process: what it sweeps twice is exchanged between
};

// Of a call; sparse: its teacher is no logits, and params.teacher is the student again.
Problem problem_of(const LossParams& params, bool sparse);

// wanted: the variant to take where the row fits it, for tests and measurements.
Plan plan_loss(const Problem& problem, const GpuLimits& gpu, std::optional<Variant> wanted = std::nullopt);

// Bytes of shared memory that `chunks` of a row take besides a block's scratch.
int64_t chunk_bytes_of(const Problem& problem, int64_t chunks, int width);

// Width and kind of the accesses to rows of these tensors; gradient.data may be null.
Access access_of(const Rows& student, const Rows& teacher, const Rows& gradient, int64_t rows);

// Whether slices of these models can be brought by bulk copies: the device has them, and chunks of both are 16 bytes.
bool brings_in_bulk(const GpuLimits& gpu, DType student, DType teacher);

// Blocks that share a row of a kernel which streams it, and threads of each.
struct Split {
  int splits = 1, threads = 256;
};
Split split_rows(int64_t rows, int64_t columns, int width, const GpuLimits& gpu);

}  // namespace fastkd
