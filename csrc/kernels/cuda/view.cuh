// A row as chunks: `width` columns that start on a 16-byte boundary in all tensors (where one model is stored in 2
// bytes a column and the other in 4, on an 8-byte boundary in the narrow one), and up to width - 1 columns before and
// behind them, its edges. Where the tensors have no such boundaries in common, a chunk is four single columns, one
// every `stride`, so that a warp still touches neighbouring addresses.
#pragma once

#include "call.h"
#include "port.cuh"

namespace fastkd {
namespace gpu {

constexpr int kMaxWidth = 8;

// Columns first, first + stride, ...: n of them. A place that is no chunk of vectors has at most four.
struct Place {
  int64_t first;
  int n, stride;
};

// Both models' columns of a place: the stored bits of a chunk of vectors, fp32 bits of any other.
struct Chunk {
  Vector student, teacher;
};

struct Quad {
  float value[4];
};

FASTKD_DEVICE float load_column(const char* row, DType dtype, int64_t column) {
  if (dtype == DType::float32) return load(reinterpret_cast<const float*>(row) + column);
  const uint16_t bits = load(reinterpret_cast<const uint16_t*>(row) + column);
  return dtype == DType::bfloat16 ? from_bf16(bits) : from_fp16(bits);
}

FASTKD_DEVICE void store_column(char* row, DType dtype, int64_t column, float x) {
  if (dtype == DType::float32) return store(reinterpret_cast<float*>(row) + column, x);
  store(reinterpret_cast<uint16_t*>(row) + column, dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x));
}

// Columns 4 q ... 4 q + 3 of a chunk; q = 1 only where 8 columns are stored in 2 bytes each.
FASTKD_DEVICE Quad unpack(const Vector& v, DType dtype, int q) {
  Quad x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = v.word[2 * q + i / 2];
    if (dtype == DType::float32) {
      x.value[i] = as_float(v.word[i]);
    } else if (dtype == DType::bfloat16) {
      x.value[i] = as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      x.value[i] = from_fp16(static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16));
    }
  }
  return x;
}

FASTKD_DEVICE HalfVector pack(float a, float b, float c, float d, DType dtype) {
  if (dtype == DType::bfloat16) return {{to_bf16_pair(a, b), to_bf16_pair(c, d)}};
  return {{to_fp16_pair(a, b), to_fp16_pair(c, d)}};
}

struct RowView {
  const char *student, *teacher;
  char* gradient;  // null: the value alone
  DType student_dtype, teacher_dtype;
  Access access;
  int columns, head, chunks;  // chunks * width columns behind the head

  FASTKD_DEVICE_METHOD RowView(const LossParams& p, Access a, int64_t n)
      : student(p.student.row(n)),
        teacher(p.teacher.row(n)),
        gradient(p.gradient.data ? p.gradient.row(n) : nullptr),
        student_dtype(p.student.dtype),
        teacher_dtype(p.teacher.dtype),
        access(a),
        columns(static_cast<int>(p.columns)) {
    const int column = static_cast<int>(reinterpret_cast<uintptr_t>(student) / size_of(student_dtype) % access.width);
    const int gap = (access.width - column) % access.width;
    head = !access.vectors ? 0 : gap < columns ? gap : columns;
    chunks = static_cast<int>((columns - (access.vectors ? head : 1 - int64_t{access.width})) / access.width);
  }

  FASTKD_DEVICE_METHOD int tail() const { return access.vectors ? columns - head - chunks * access.width : 0; }

  // What thread `lane` of `lanes` takes of the chunks base ... base + lanes - 1, those before `end`.
  FASTKD_DEVICE_METHOD Place place(int base, int end, int lane, int lanes) const {
    const int64_t width = access.width;
    if (access.vectors) return {head + (base + lane) * width, base + lane < end ? access.width : 0, 1};
    const int64_t first = base * width + lane, limit = end * width < columns ? end * width : columns;
    const int64_t n = first < limit ? (limit - first + lanes - 1) / lanes : 0;
    return {first, static_cast<int>(n < width ? n : width), lanes};
  }
  // Columns from first to last - 1, four at a time: place k of them.
  FASTKD_DEVICE_METHOD static Place edge(int first, int last, int k) {
    const int left = last - first - 4 * k;
    return {first + 4 * k, left < 4 ? left : 4, 1};
  }

  // The chunk at a place of vectors. kReadOnly: nothing writes these rows while the kernel runs.
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Chunk load_vectors(const Place& at) const {
    return {load_model<kReadOnly>(student, student_dtype, at.first),
            load_model<kReadOnly>(teacher, teacher_dtype, at.first)};
  }

  // Column by column, masked behind the place's last.
  FASTKD_DEVICE_METHOD Chunk load_columns(const Place& at) const {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = i < at.n;
      const int64_t column = at.first + static_cast<int64_t>(i) * at.stride;
      chunk.student.word[i] = as_bits(inside ? load_column(student, student_dtype, column) : minus_infinity());
      chunk.teacher.word[i] = as_bits(inside ? load_column(teacher, teacher_dtype, column) : minus_infinity());
    }
    return chunk;
  }

  // d: the place's columns; `whole`: it is a chunk of vectors.
  FASTKD_DEVICE_METHOD void store_gradient(const Place& at, bool whole, const float (&d)[kMaxWidth]) const {
    if (!whole) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < at.n) store_column(gradient, student_dtype, at.first + static_cast<int64_t>(i) * at.stride, d[i]);
      return;
    }
    char* to = gradient + at.first * size_of(student_dtype);
    if (student_dtype == DType::float32)
      return store_vector(to, {{as_bits(d[0]), as_bits(d[1]), as_bits(d[2]), as_bits(d[3])}});
    const HalfVector low = pack(d[0], d[1], d[2], d[3], student_dtype);
    if (at.n == 4) return store_half_vector(to, low);
    const HalfVector high = pack(d[4], d[5], d[6], d[7], student_dtype);
    store_vector(to, {{low.word[0], low.word[1], high.word[0], high.word[1]}});
  }

  // Bytes of a chunk of one model: 16, or 8.
  FASTKD_DEVICE_METHOD int chunk_bytes(DType dtype) const { return access.width * static_cast<int>(size_of(dtype)); }

 private:
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Vector load_model(const char* row, DType dtype, int64_t column) const {
    const char* from = row + column * size_of(dtype);
    if (chunk_bytes(dtype) == 16) return kReadOnly ? load_vector(from) : load_vector_coherent(from);
    const HalfVector half = load_half_vector(from);
    return {{half.word[0], half.word[1], 0, 0}};
  }
};

// Threads that work on one row together, and which part of it is theirs.
struct Team {
  int lane, lanes;  // this thread, and threads of the part
  int part, parts;  // blocks of a row

  // Parts of equal size, the last one short or empty.
  FASTKD_DEVICE_METHOD int begin(int chunks) const {
    const int64_t first = static_cast<int64_t>(part) * size(chunks);
    return first < chunks ? static_cast<int>(first) : chunks;
  }
  FASTKD_DEVICE_METHOD int end(int chunks) const {
    const int64_t last = static_cast<int64_t>(part + 1) * size(chunks);
    return last < chunks ? static_cast<int>(last) : chunks;
  }
  FASTKD_DEVICE_METHOD bool has_head() const { return part == 0 && lane == 0; }
  FASTKD_DEVICE_METHOD bool has_tail() const { return part == parts - 1 && lane == lanes - 1; }

 private:
  FASTKD_DEVICE_METHOD int size(int chunks) const { return (chunks + parts - 1) / parts; }
};

// Sets `bytes` of memory, a multiple of 2, to 0 by all threads of all parts.
FASTKD_DEVICE void zero(char* begin, int64_t bytes, const Team& team) {
  const int64_t index = static_cast<int64_t>(team.part) * team.lanes + team.lane;
  const int64_t threads = static_cast<int64_t>(team.parts) * team.lanes;
  int64_t head = (16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16;
  if (head > bytes) head = bytes;
  const int64_t vectors = (bytes - head) / 16, behind = head + vectors * 16;
  for (int64_t i = index; i < vectors; i += threads) store_vector(begin + head + i * 16, Vector{{0, 0, 0, 0}});
  for (int64_t i = 2 * index; i < head; i += 2 * threads) store(reinterpret_cast<uint16_t*>(begin + i), uint16_t{0});
  for (int64_t i = behind + 2 * index; i < bytes; i += 2 * threads)
    store(reinterpret_cast<uint16_t*>(begin + i), uint16_t{0});
}

// Gradient columns from `first` on: those beyond the shared vocabulary, or all of an ignored row.
FASTKD_DEVICE void zero_gradient(const LossParams& p, int64_t n, int64_t first, const Team& team) {
  if (!p.gradient.data || first >= p.gradient_columns) return;
  const int64_t size = size_of(p.gradient.dtype);
  zero(p.gradient.row(n) + first * size, (p.gradient_columns - first) * size, team);
}

FASTKD_DEVICE void ignore_row(const LossParams& p, int64_t n, const Team& team) {
  zero_gradient(p, n, 0, team);
  if (team.part != 0 || team.lane != 0) return;
  store(p.row_loss + n, 0.0f);
  for (int i = 0; p.stats && i < 5; ++i) store(p.stats + i * p.rows + n, 0.0f);
}

}  // namespace gpu
}  // namespace fastkd
