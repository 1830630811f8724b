// Refusals: "NAME must ...; got ...", with the argument's name, what was expected and what came.
//
// The checks of shape, dtype, device and stride that every op shares. What tensors hold is checked
// in check_values.h. A check that passes reads what it compares and nothing else.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
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

// A floating-point number as Python writes it.
struct Float {
  double value;
};
std::ostream& operator<<(std::ostream& text, const Float& number);

// What messages show of a tensor, read only where one is written: its shape "(2, 3)", its strides,
// its dtype "torch.float32", its device "cuda:0".
struct Shape {
  const int64_t* sizes;
  int64_t rank;
};
struct ShapeOf {
  const Tensor& tensor;
};
struct StridesOf {
  const Tensor& tensor;
};
struct DtypeOf {
  const Tensor& tensor;
};
struct DeviceOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << '(';
  for (int64_t i = 0; i < shape.rank; ++i) text << (i > 0 ? ", " : "") << shape.sizes[i];
  return text << (shape.rank == 1 ? ",)" : ")");
}
inline std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  return text << Shape{shape.tensor.sizes().data(), shape.tensor.dim()};
}
inline std::ostream& operator<<(std::ostream& text, const StridesOf& strides) {
  return text << Shape{strides.tensor.strides().data(), strides.tensor.dim()};
}

inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }

// Undefined for a dtype without a name here, and for None.
ScalarType scalar_type_of(const Tensor& tensor);
// As torch spells it; "another dtype" for one without a name here.
const char* dtype_name(ScalarType dtype);

std::ostream& operator<<(std::ostream& text, const DtypeOf& dtype);
std::ostream& operator<<(std::ostream& text, const DeviceOf& device);

// Python's None comes as an undefined tensor. Its rank is 1 and its dtype none, so that the checks
// of rank and dtype find it.
[[noreturn]] void refuse_none(const char* name, const char* expected);

// dims: what the dimensions are, "(batch, seqlen_q, num_heads_q, head_dim)".
inline void check_rank(const Tensor& tensor, const char* name, int64_t rank, const char* dims) {
  if (tensor.dim() == rank) [[likely]]
    return;
  if (!tensor.defined()) refuse_none(name, dims);
  refuse<ValueError>(name, " must have ", rank, " dimension", rank == 1 ? " " : "s ", dims,
                     "; got shape ", shape_of(tensor));
}

// like: the argument that the expected size comes from.
inline void check_size(const Tensor& tensor, const char* name, int64_t dim, const char* dim_name,
                       int64_t expected, const char* like) {
  if (tensor.size(dim) == expected) [[likely]]
    return;
  refuse<ValueError>(name, " must have ", dim_name, " = ", expected, " (as ", like,
                     " has); got shape ", shape_of(tensor));
}

// dims: as for check_rank, or nullptr where there are no words for them.
inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected, const char* dims = nullptr) {
  const int64_t rank = static_cast<int64_t>(expected.size());
  const auto sizes = tensor.sizes();
  if (static_cast<int64_t>(sizes.size()) == rank &&
      std::equal(expected.begin(), expected.end(), sizes.begin())) [[likely]]
    return;
  if (!tensor.defined()) refuse_none(name, dims != nullptr ? dims : "");
  refuse<ValueError>(name, " must have shape ", dims != nullptr ? dims : "",
                     dims != nullptr ? " = " : "", Shape{expected.begin(), rank}, "; got ",
                     shape_of(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  if (scalar_type_of(tensor) == expected) [[likely]]
    return;
  if (!tensor.defined()) refuse_none(name, "");
  refuse<TypeError>(name, " must have dtype ", dtype_name(expected), "; got ", DtypeOf{tensor});
}

inline void check_same_dtype(const Tensor& tensor, const char* name, const Tensor& like,
                             const char* like_name) {
  const ScalarType dtype = scalar_type_of(tensor);
  if (dtype == scalar_type_of(like) && dtype != ScalarType::Undefined) [[likely]]
    return;
  if (!tensor.defined()) refuse_none(name, "");
  refuse<TypeError>(name, " must have the dtype of ", like_name, ", ", DtypeOf{like}, "; got ",
                    DtypeOf{tensor}, ": cast it");
}

bool is_same_device(const Tensor& a, const Tensor& b);

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& first) {
  if (is_same_device(tensor, first)) [[likely]]
    return;
  refuse<ValueError>(name, " must be on ", DeviceOf{first}, " like the other tensors; got ",
                     DeviceOf{tensor});
}

// A dimension of size 0 or 1 has no stride to speak of, nor has a tensor without elements.
inline bool has_unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0;
}

inline void check_unit_last_stride(const Tensor& tensor, const char* name) {
  if (has_unit_last_stride(tensor)) [[likely]]
    return;
  refuse<ValueError>(name, " must have stride 1 in its last dimension; got strides ",
                     StridesOf{tensor}, ": pass ", name, ".contiguous()");
}

inline void check_at_least(int64_t value, const char* name, int64_t least, const char* why = "") {
  check(value >= least, name, " must be at least ", least, why, "; got ", value);
}

// Of q, k, v and what is shaped like them.
inline DataType float_type(const Tensor& tensor, const char* name) {
  switch (scalar_type_of(tensor)) {
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
  if (!tensor.defined()) refuse_none(name, "");
  refuse<TypeError>(name, " must have dtype float64, float32, float16 or bfloat16; got ",
                    DtypeOf{tensor});
}

// An int32 vector such as cu_seqlens_q, of `length` entries: "batch + 1", say, as `like` has.
inline const int32_t* int32_vector(const Tensor& tensor, const char* name, int64_t length,
                                   const Tensor& first, const char* length_name = "batch",
                                   const char* like = "q") {
  check_dtype(tensor, name, ScalarType::Int);
  check(tensor.dim() == 1, name, " must have 1 dimension (", length_name, ",); got shape ",
        shape_of(tensor));
  check_size(tensor, name, 0, length_name, length, like);
  check_unit_last_stride(tensor, name);
  check_same_device(tensor, name, first);
  return tensor.const_data_ptr<int32_t>();
}

inline ScalarType out_scalar_type(const Tensor& q) {
  return scalar_type_of(q) == ScalarType::Float8_e4m3fn ? ScalarType::BFloat16 : scalar_type_of(q);
}
inline ScalarType lse_scalar_type(const Tensor& q) {
  return scalar_type_of(q) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace sink_attention::binding
