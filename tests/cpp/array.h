// An array of any dtype in a heap block of exactly its size, so that AddressSanitizer finds every
// access out of bounds; and random values to fill it.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "attention/numeric.h"
#include "attention/paged_kv.h"
#include "attention/params.h"

namespace sink_attention::tests {

using attention::DataType;

inline double load(const void* data, DataType dtype, int64_t index) {
  switch (dtype) {
    case DataType::kFloat64:
      return static_cast<const double*>(data)[index];
    case DataType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DataType::kFloat16:
      return attention::to_float(static_cast<const attention::Float16*>(data)[index]);
    case DataType::kBFloat16:
      return attention::to_float(static_cast<const attention::BFloat16*>(data)[index]);
    case DataType::kFloat8E4M3:
      return attention::to_float(static_cast<const attention::Float8E4M3*>(data)[index]);
    case DataType::kInt8:
      return attention::to_float(static_cast<const attention::Int8*>(data)[index]);
  }
  return NAN;
}

inline void store(void* data, DataType dtype, int64_t index, double value) {
  const float rounded = static_cast<float>(value);
  switch (dtype) {
    case DataType::kFloat64:
      static_cast<double*>(data)[index] = value;
      break;
    case DataType::kFloat32:
      static_cast<float*>(data)[index] = rounded;
      break;
    case DataType::kFloat16:
      static_cast<attention::Float16*>(data)[index] = attention::to_float16(rounded);
      break;
    case DataType::kBFloat16:
      static_cast<attention::BFloat16*>(data)[index] = attention::to_bfloat16(rounded);
      break;
    case DataType::kFloat8E4M3:
      static_cast<attention::Float8E4M3*>(data)[index] = attention::to_float8_e4m3(rounded);
      break;
    case DataType::kInt8:
      static_cast<attention::Int8*>(data)[index] = attention::to_int8(rounded);
      break;
  }
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  int64_t below(int64_t bound) {
    return std::uniform_int_distribution<int64_t>(0, bound - 1)(engine_);
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

class Array {
 public:
  Array() = default;
  Array(DataType dtype, int64_t count)  // filled with NaN, to find unwritten elements
      : dtype_(dtype), count_(count), bytes_(new char[count * attention::bytes_of(dtype)]) {
    fill(NAN);
  }
  static Array normal(DataType dtype, int64_t count, Random& random) {
    Array array(dtype, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, random.normal());
    return array;
  }
  void fill(double value) {
    for (int64_t i = 0; i < count_; ++i) set(i, value);
  }
  double operator[](int64_t index) const { return load(bytes_.get(), dtype_, index); }
  void set(int64_t index, double value) { store(bytes_.get(), dtype_, index, value); }
  void* data() const { return bytes_.get(); }
  int64_t count() const { return count_; }
  DataType dtype() const { return dtype_; }

 private:
  DataType dtype_ = DataType::kFloat32;
  int64_t count_ = 0;
  std::unique_ptr<char[]> bytes_;
};

inline DataType lse_type(DataType dtype) {
  return dtype == DataType::kFloat64 ? dtype : DataType::kFloat32;
}

inline const char* name_of(DataType dtype) {
  constexpr const char* kNames[] = {"float64",  "float32",     "float16",
                                    "bfloat16", "float8_e4m3", "int8"};
  return kNames[static_cast<int>(dtype)];
}

}  // namespace sink_attention::tests
