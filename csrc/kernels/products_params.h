// Sums of products of bf16 matrices, as the kernels of the linear loss see them. No torch.
#pragma once

#include "params.h"

namespace fastkd {

// total (fp32) += product (bf16).
struct AddParams {
  int64_t rows = 0, columns = 0;
  Rows total, product;
};

// result (V, H) = the transpose of sum (H, V), fp32, rounded to the result's dtype.
struct TurnParams {
  int64_t rows = 0, columns = 0;  // V, H
  Rows result, sum;
};
constexpr int kTurnedRows = 16;  // of the result at a time

}  // namespace fastkd
