// Tensors for results, from torch's allocator without a look-up in its dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <initializer_list>

#include "torch/checks.h"

namespace sink_attention::binding {

// Uninitialised and contiguous, on the device of `like`; dtype: as aoti_torch_get_dtype spells it.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t rank, int32_t dtype) {
  constexpr int64_t kMostDims = 4;
  check_state(rank <= kMostDims, "results have up to 4 dimensions");
  int64_t strides[kMostDims], stride = 1;
  for (int64_t dim = rank - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle made = nullptr;
  const bool ok =
      aoti_torch_get_device_type(like.get(), &device_type) == 0 &&
      aoti_torch_get_device_index(like.get(), &device_index) == 0 &&
      aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type, device_index, &made) == 0;
  check_state(ok, "torch could not allocate a result of shape ", Shape{sizes, rank});
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  return new_tensor(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// Of the shape and dtype of `like`.
inline Tensor new_tensor_like(const Tensor& like) {
  int32_t dtype = 0;
  check_state(aoti_torch_get_dtype(like.get(), &dtype) == 0, "torch could not tell a dtype");
  const auto sizes = like.sizes();
  return new_tensor(like, sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor new_zeros_like(const Tensor& like) {
  Tensor made = new_tensor_like(like);
  check_state(aoti_torch_zero_(made.get()) == 0, "torch could not fill a result with zeros");
  return made;
}

}  // namespace sink_attention::binding
