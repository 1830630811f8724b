#include "torch/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <charconv>

namespace sink_attention::binding {
namespace {

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  return aoti_torch_get_dtype(tensor.get(), &dtype) == 0 ? dtype : -1;
}

struct RawDevice {
  int32_t type, index;
  bool operator==(const RawDevice&) const = default;
};

RawDevice raw_device(const Tensor& tensor) {
  RawDevice device{-1, -1};
  aoti_torch_get_device_type(tensor.get(), &device.type);
  aoti_torch_get_device_index(tensor.get(), &device.index);
  return device;
}

}  // namespace

// Not Tensor::scalar_type(), which throws a RuntimeError at dtypes that it has no name for.
ScalarType scalar_type_of(const Tensor& tensor) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_int64(), ScalarType::Long},
      {aoti_torch_dtype_float8_e4m3fn(), ScalarType::Float8_e4m3fn},
      {aoti_torch_dtype_int8(), ScalarType::Char},
      {aoti_torch_dtype_uint8(), ScalarType::Byte},
      {aoti_torch_dtype_int16(), ScalarType::Short},
      {aoti_torch_dtype_bool(), ScalarType::Bool},
      {aoti_torch_dtype_float8_e5m2(), ScalarType::Float8_e5m2},
      {aoti_torch_dtype_complex32(), ScalarType::ComplexHalf},
      {aoti_torch_dtype_complex64(), ScalarType::ComplexFloat},
      {aoti_torch_dtype_complex128(), ScalarType::ComplexDouble},
  };
  const int32_t raw = raw_dtype(tensor);
  for (const auto& [value, dtype] : known) {
    if (value == raw) return dtype;
  }
  return ScalarType::Undefined;
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return "another dtype";
  }
}

std::ostream& operator<<(std::ostream& text, const Float& number) {
  if (!std::isfinite(number.value)) {
    return text << (std::isnan(number.value) ? "nan" : number.value > 0 ? "inf" : "-inf");
  }
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof(digits), number.value).ptr;
  const std::string_view shortest(digits, end - digits);
  return text << shortest << (shortest.find_first_of(".e") == shortest.npos ? ".0" : "");
}

std::ostream& operator<<(std::ostream& text, const DtypeOf& dtype) {
  return text << dtype_name(scalar_type_of(dtype.tensor));
}

std::ostream& operator<<(std::ostream& text, const DeviceOf& device) {
  const RawDevice raw = raw_device(device.tensor);
  if (raw.type == aoti_torch_device_type_cpu()) return text << "cpu";
  if (raw.type == aoti_torch_device_type_meta()) return text << "meta";
  if (raw.type == aoti_torch_device_type_cuda()) return text << "cuda:" << raw.index;
  return text << "another device";
}

bool is_same_device(const Tensor& a, const Tensor& b) { return raw_device(a) == raw_device(b); }

void refuse_none(const char* name, const char* expected) {
  refuse<TypeError>(name, " must be a torch.Tensor", *expected != '\0' ? " " : "", expected,
                    "; got None");
}

}  // namespace sink_attention::binding
