// Refusals: one helper that throws with the argument's name, what came and what was expected, and
// the checks of shape, dtype and stride that every op shares. Values inside tensors are looked at
// in check_values.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "attention/params.h"
#include "torch/python_errors.h"

namespace sink_attention::binding {

using attention::DataType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Error, class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw Error(std::move(message).str());
}

// Throws a ValueError with the parts as its message unless ok.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    refuse<ValueError>(parts...);
}

// The same with a TypeError: for dtypes.
template <class... Parts>
inline void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    refuse<TypeError>(parts...);
}

// The same with a RuntimeError: for what is no argument's fault.
template <class... Parts>
inline void check_state(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    refuse<std::runtime_error>(parts...);
}

// A shape as messages show it, "(2, 3)"; formatted only where a message is written.
struct Shape {
  const int64_t* sizes;
  int64_t rank;
};

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << '(';
  for (int64_t i = 0; i < shape.rank; ++i) text << (i > 0 ? ", " : "") << shape.sizes[i];
  return text << (shape.rank == 1 ? ",)" : ")");
}

inline Shape shape_of(const Tensor& tensor) { return {tensor.sizes().data(), tensor.dim()}; }

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank, const char* dims) {
  check(tensor.dim() == rank, name, " must have ", rank, " dimensions ", dims, ", got shape ",
        shape_of(tensor));
}

inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  const int64_t* want = expected.begin();
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == want[i];
  check(same, name, " must have shape ", Shape{want, static_cast<int64_t>(expected.size())},
        ", got ", shape_of(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  check_type(tensor.scalar_type() == expected, name, " must have dtype ", dtype_name(expected),
             "; got ", dtype_name(tensor.scalar_type()));
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& q) {
  check(tensor.device() == q.device(), name, " must be on the device of the first argument");
}

// A dimension of size 0 or 1 has no stride to speak of, nor has a tensor without elements.
inline bool has_unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0;
}

inline void check_unit_last_stride(const Tensor& tensor, const char* name) {
  check(has_unit_last_stride(tensor), name,
        " must have stride 1 in its last dimension, got stride ", tensor.stride(tensor.dim() - 1),
        "; call .contiguous() on it");
}

// Of q, k, v and what is shaped like them.
inline DataType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Half:
      return DataType::kFloat16;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    default:
      break;
  }
  refuse<TypeError>(name, " must have dtype float64, float32, float16 or bfloat16; got ",
                    dtype_name(tensor.scalar_type()));
}

// An int32 vector such as cu_seqlens_q.
inline const int32_t* int32_vector(const Tensor& tensor, const char* name, int64_t length,
                                   const Tensor& q) {
  check_dtype(tensor, name, ScalarType::Int);
  check_shape(tensor, name, {length});
  check_unit_last_stride(tensor, name);
  check_same_device(tensor, name, q);
  return tensor.const_data_ptr<int32_t>();
}

inline ScalarType out_scalar_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Float8_e4m3fn ? ScalarType::BFloat16 : q.scalar_type();
}
inline ScalarType lse_scalar_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace sink_attention::binding
