// What stands between the matrix products of the linear loss: a bf16 product is added to its fp32 sum as it is read,
// and such a sum is transposed as it is rounded.
#pragma once

#include "../products_params.h"
#include "convert.h"

namespace fastkd {
namespace {

void add_row(float* total, const char* product, int64_t columns) {
  constexpr DType dtype = DType::bfloat16;
  constexpr int64_t size = size_of(dtype);
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    (Vec::load(total + i) + load_lanes<dtype>(product + i * size)).store(total + i);
  }
  if (whole == columns) return;
  float rest[kLanes];
  load_block_as<dtype>(product + whole * size, static_cast<int>(columns - whole), 0, rest);
  for (int64_t i = whole; i < columns; ++i) total[i] += rest[i - whole];
}

void run_add(const AddParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    add_row(reinterpret_cast<float*>(p.total.row(n)), p.product.row(n), p.columns);
  }
}

// A tile of the result: `high` rows, one cache line of each of `wide` rows of the sum.
template <int kWide>
FASTKD_FN void turn_tile(const TurnParams& p, int64_t v, int64_t h, int high, int wide) {
  float tile[kTurnedRows][kWide];
  for (int j = 0; j < wide; ++j) {
    const float* line = reinterpret_cast<const float*>(p.sum.row(h + j)) + v;
    __builtin_prefetch(line + kTurnedRows);  // of the next tile
    for (int i = 0; i < high; ++i) tile[i][j] = line[i];
  }
  for (int i = 0; i < high; ++i) {
    store_block(tile[i], wide, p.result.dtype, p.result.row(v + i) + h * size_of(p.result.dtype));
  }
}

// Tiles [begin, end) of kTurnedRows rows. Whole ones are known to the compiler as such: a third of the time.
void run_turn(const TurnParams& p, int64_t begin, int64_t end) {
  constexpr int kWide = 256;
  for (int64_t v = begin * kTurnedRows; v < end * kTurnedRows && v < p.rows; v += kTurnedRows) {
    const int high = static_cast<int>(p.rows - v < kTurnedRows ? p.rows - v : kTurnedRows);
    for (int64_t h = 0; h < p.columns; h += kWide) {
      const int wide = static_cast<int>(p.columns - h < kWide ? p.columns - h : kWide);
      if (high == kTurnedRows) {
        turn_tile<kWide>(p, v, h, kTurnedRows, wide);
      } else {
        turn_tile<kWide>(p, v, h, high, wide);
      }
    }
  }
}

}  // namespace
}  // namespace fastkd
