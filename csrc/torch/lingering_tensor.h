// A tensor in memory that lingers for the next call after it is freed, where torch can wrap memory that has a deleter.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../kernels/cpu/lingering_memory.h"
#include "rows.h"

// Of torch >= 2.11. Weak: null in 2.10, where the extension must load as well.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace fastkd {

inline int32_t shim_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32: return aoti_torch_dtype_float32();
    case DType::bfloat16: return aoti_torch_dtype_bfloat16();
    case DType::float16: return aoti_torch_dtype_float16();
  }
  return 0;
}

// Contiguous, uninitialised, in memory of at least `capacity` bytes; nothing where lingering memory is not to be had.
inline std::optional<Tensor> lingering_tensor(const std::vector<int64_t>& shape, DType dtype, size_t capacity,
                                              std::optional<Lingers> kind) {
  const char* error = "";
  const long long limit = linger_limit(&error);
  STD_TORCH_CHECK(limit >= 0, error);
  if (!torch_from_blob) return std::nullopt;
  std::vector<int64_t> strides(shape.size());
  int64_t elements = 1;
  for (size_t d = shape.size(); d-- > 0; elements *= shape[d]) strides[d] = elements;
  const size_t bytes = std::max(capacity, static_cast<size_t>(elements * size_of(dtype)));
  LingeringMemory* memory = take_memory(bytes, limit, kind ? *kind : gradient_of(bytes));
  if (!memory) return std::nullopt;
  const auto deleter = [](void*, void* context) { free_memory(static_cast<LingeringMemory*>(context)); };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError failed = torch_from_blob(memory->data, static_cast<int64_t>(shape.size()), shape.data(),
                                                strides.data(), 0, shim_dtype(dtype), aoti_torch_device_type_cpu(), -1,
                                                &handle, aoti_torch_layout_strided(), nullptr, 0, deleter, memory);
  if (!failed) return Tensor(handle);
  free_memory(memory);
  return std::nullopt;
}

}  // namespace fastkd
