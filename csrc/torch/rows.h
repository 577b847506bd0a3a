// Tensors as rows: what the kernels can address without a copy.
#pragma once

#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../kernels/params.h"

namespace fastkd {

using torch::stable::Tensor;

inline DType dtype_of(const char* name, const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// The rows of x (..., V) on at most two levels of strides, or nothing where that needs a copy.
inline std::optional<Rows> view_as_rows(const char* name, const Tensor& x) {
  Rows rows;
  rows.dtype = dtype_of(name, x);
  rows.data = const_cast<void*>(x.const_data_ptr());
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return std::nullopt;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // innermost level first
  int level = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (level >= 0 && x.stride(d) == sizes[level] * strides[level]) {
      sizes[level] *= x.size(d);
      continue;
    }
    if (++level == 2) return std::nullopt;
    sizes[level] = x.size(d);
    strides[level] = x.stride(d);
  }
  rows.inner = sizes[0] > 0 ? sizes[0] : 1;
  rows.inner_stride = strides[0];
  rows.outer_stride = strides[1];
  return rows;
}

}  // namespace fastkd
