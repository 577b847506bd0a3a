// A row as chunks: `width` columns that start on a 16-byte boundary in all tensors (where one model is stored in 2
// bytes a column and the other in 4, on an 8-byte boundary in the narrow one), and up to width - 1 columns before and
// behind them, its edges. Where the tensors have no such boundaries in common, a chunk is four single columns, one
// every `stride`, so that a warp still touches neighbouring addresses.
#pragma once

#include "call.h"
#include "port.cuh"

namespace fastkd {
namespace gpu {

// n columns from `first` on, one every RowView::stride: a chunk of vectors where n is the width of one, else four at
// most.
struct Place {
  int first, n;
};

// Both models' columns of a place, as they are stored.
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

// Columns 4 q ... 4 q + 3 of a chunk; q = 1 only where 8 columns are stored in 2 bytes each.
FASTKD_DEVICE Quad unpack(const Vector& v, DType dtype, int q) {
  if (dtype == DType::float32)
    return {{as_float(v.word[0]), as_float(v.word[1]), as_float(v.word[2]), as_float(v.word[3])}};
  const uint32_t low = q == 0 ? v.word[0] : v.word[2], high = q == 0 ? v.word[1] : v.word[3];
  if (dtype == DType::bfloat16) {
    return {{as_float(low << 16), as_float(low & 0xffff0000u), as_float(high << 16), as_float(high & 0xffff0000u)}};
  }
  return {{from_fp16(static_cast<uint16_t>(low)), from_fp16(static_cast<uint16_t>(low >> 16)),
           from_fp16(static_cast<uint16_t>(high)), from_fp16(static_cast<uint16_t>(high >> 16))}};
}

// A quad in 2 bytes a column.
FASTKD_DEVICE HalfVector pack(const Quad& x, DType dtype) {
  if (dtype == DType::bfloat16) return {{to_bf16_pair(x.value[0], x.value[1]), to_bf16_pair(x.value[2], x.value[3])}};
  return {{to_fp16_pair(x.value[0], x.value[1]), to_fp16_pair(x.value[2], x.value[3])}};
}

// The stored bits of one column, and those of a masked one.
FASTKD_DEVICE uint32_t load_bits(const char* row, DType dtype, int64_t column) {
  if (dtype == DType::float32) return load(reinterpret_cast<const uint32_t*>(row) + column);
  return load(reinterpret_cast<const uint16_t*>(row) + column);
}
FASTKD_DEVICE uint32_t masked_bits(DType dtype) {
  return dtype == DType::float32 ? 0xff800000u : dtype == DType::bfloat16 ? 0xff80u : 0xfc00u;
}

struct RowView {
  const char *student, *teacher;
  char* gradient;  // null: the value alone
  DType student_dtype, teacher_dtype;
  Access access;
  int columns, head, chunks;  // chunks * width columns behind the head
  int stride;                 // of the columns of a place, 1 where there are vectors

  // lanes: threads that take neighbouring places
  FASTKD_DEVICE_METHOD RowView(const LossParams& p, Access a, int64_t n, int lanes)
      : student(p.student.row(n)),
        teacher(p.teacher.row(n)),
        gradient(p.gradient.data ? p.gradient.row(n) : nullptr),
        student_dtype(p.student.dtype),
        teacher_dtype(p.teacher.dtype),
        access(a),
        columns(static_cast<int>(p.columns)),
        stride(a.vectors ? 1 : lanes) {
    const int column = static_cast<int>(reinterpret_cast<uintptr_t>(student) / size_of(student_dtype) % access.width);
    const int gap = (access.width - column) % access.width;
    head = !access.vectors ? 0 : gap < columns ? gap : columns;
    chunks = static_cast<int>((columns - (access.vectors ? head : 1 - int64_t{access.width})) / access.width);
  }

  FASTKD_DEVICE_METHOD int tail() const { return access.vectors ? columns - head - chunks * access.width : 0; }

  FASTKD_DEVICE_METHOD bool whole(const Place& at) const { return access.vectors && at.n == access.width; }
  FASTKD_DEVICE_METHOD Place chunk(int c) const { return {head + c * access.width, access.width}; }

  // What thread `lane` takes of the chunks base, base + 1, ... that its neighbours take with it, those before `end`.
  FASTKD_DEVICE_METHOD Place place(int base, int end, int lane) const {
    if (access.vectors) return {head + (base + lane) * access.width, base + lane < end ? access.width : 0};
    const int64_t first = int64_t{base} * access.width + lane, behind = int64_t{end} * access.width;
    const int64_t limit = behind < columns ? behind : columns;
    const int64_t n = first < limit ? (limit - first + stride - 1) / stride : 0;
    return {static_cast<int>(first), static_cast<int>(n < access.width ? n : access.width)};
  }
  // The edges, four columns at a time: places 0 ... heads - 1 of the head, then those of the tail.
  FASTKD_DEVICE_METHOD Place edge(int k, int heads) const {
    const int first = k < heads ? 4 * k : columns - tail() + 4 * (k - heads);
    const int left = (k < heads ? head : columns) - first;
    return {first, left < 4 ? left : 4};
  }

  // Columns of the row that a part with these chunks owns, its edges included: from the first one to the end.
  FASTKD_DEVICE_METHOD int first_of(int chunk, bool first_part) const {
    const int64_t column = head + int64_t{chunk} * access.width;
    return first_part ? 0 : column < columns ? static_cast<int>(column) : columns;
  }
  FASTKD_DEVICE_METHOD int end_of(int chunk, bool last_part) const {
    return last_part ? columns : first_of(chunk, false);
  }

  // The chunk at a place of vectors. kReadOnly: nothing writes these rows while the kernel runs.
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Chunk load_vectors(const Place& at) const {
    return {load_model<kReadOnly>(student, student_dtype, at.first),
            load_model<kReadOnly>(teacher, teacher_dtype, at.first)};
  }

  // Column by column, masked behind the place's last.
  FASTKD_DEVICE_METHOD Chunk load_columns(const Place& at) const {
    return {load_model_columns(student, student_dtype, at), load_model_columns(teacher, teacher_dtype, at)};
  }
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Chunk load_place(const Place& at) const {
    return whole(at) ? load_vectors<kReadOnly>(at) : load_columns(at);
  }

  // Quad q of the place's gradient in what will be stored of it.
  FASTKD_DEVICE_METHOD void put(Vector& stored, const Quad& d, int q) const {
    if (student_dtype == DType::float32) {
      stored = {{as_bits(d.value[0]), as_bits(d.value[1]), as_bits(d.value[2]), as_bits(d.value[3])}};
      return;
    }
    const HalfVector half = pack(d, student_dtype);
    stored.word[0] = q == 0 ? half.word[0] : stored.word[0];
    stored.word[1] = q == 0 ? half.word[1] : stored.word[1];
    stored.word[2] = half.word[0];
    stored.word[3] = half.word[1];
  }

  FASTKD_DEVICE_METHOD void store_gradient(const Place& at, const Vector& stored) const {
    char* to = gradient + at.first * size_of(student_dtype);
    if (whole(at)) {
      if (chunk_bytes(student_dtype) == 16) return store_vector(to, stored);
      return store_half_vector(to, {{stored.word[0], stored.word[1]}});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= at.n) continue;
      const int64_t column = static_cast<int64_t>(i) * stride;
      if (student_dtype == DType::float32) {
        store(reinterpret_cast<uint32_t*>(to) + column, stored.word[i]);
      } else {
        store(reinterpret_cast<uint16_t*>(to) + column, static_cast<uint16_t>(stored.word[i / 2] >> (16 * (i % 2))));
      }
    }
  }

  // Bytes of a chunk of one model: 16, or 8.
  FASTKD_DEVICE_METHOD int chunk_bytes(DType dtype) const { return access.width * static_cast<int>(size_of(dtype)); }

 protected:
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Vector load_model(const char* row, DType dtype, int64_t column) const {
    const char* from = row + column * size_of(dtype);
    if (chunk_bytes(dtype) == 16) return kReadOnly ? load_vector(from) : load_vector_coherent(from);
    const HalfVector half = load_half_vector(from);
    return {{half.word[0], half.word[1], 0, 0}};
  }

  FASTKD_DEVICE_METHOD Vector load_model_columns(const char* row, DType dtype, const Place& at) const {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t column = at.first + static_cast<int64_t>(i) * stride;
      bits[i] = i < at.n ? load_bits(row, dtype, column) : masked_bits(dtype);
    }
    if (dtype == DType::float32) return {{bits[0], bits[1], bits[2], bits[3]}};
    return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, 0, 0}};
  }
};

// A row of the student alone: chunks have no teacher.
struct StudentView : RowView {
  using RowView::RowView;

  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Chunk load_vectors(const Place& at) const {
    return {load_model<kReadOnly>(student, student_dtype, at.first), {}};
  }
  FASTKD_DEVICE_METHOD Chunk load_columns(const Place& at) const {
    return {load_model_columns(student, student_dtype, at), {}};
  }
  template <bool kReadOnly>
  FASTKD_DEVICE_METHOD Chunk load_place(const Place& at) const {
    return whole(at) ? load_vectors<kReadOnly>(at) : load_columns(at);
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
  // Edges of the row that this thread takes, four columns each.
  FASTKD_DEVICE_METHOD int heads(int head) const { return part == 0 && lane == 0 ? (head + 3) / 4 : 0; }
  FASTKD_DEVICE_METHOD int tails(int tail) const { return part == parts - 1 && lane == lanes - 1 ? (tail + 3) / 4 : 0; }

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
