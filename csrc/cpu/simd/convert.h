// Conversion of rows in memory to and from float or double, for every element type.
#pragma once

#include "attention/paged_kv.h"
#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

using attention::BFloat16;
using attention::DataType;
using attention::Float16;
using attention::Float8E4M3;
using attention::Int8;

SA_INLINE const void* element(const void* base, DataType dtype, int64_t offset) {
  return static_cast<const char*>(base) + offset * attention::bytes_of(dtype);
}
SA_INLINE void* element(void* base, DataType dtype, int64_t offset) {
  return static_cast<char*>(base) + offset * attention::bytes_of(dtype);
}

// destination[i] = source[i] * scale. Only 8-bit types have a scale; it is 1 for all others.
template <class Real>
SA_INLINE void load_row(const void* source, DataType dtype, int64_t count, Real scale,
                        Real* destination) {
  int64_t i = 0;
  switch (dtype) {
    case DataType::kFloat64: {
      const double* row = static_cast<const double*>(source);
      for (; i < count; ++i) destination[i] = static_cast<Real>(row[i]);
      return;
    }
    case DataType::kFloat32: {
      const float* row = static_cast<const float*>(source);
      for (; i < count; ++i) destination[i] = static_cast<Real>(row[i]);
      return;
    }
    case DataType::kBFloat16: {
      const BFloat16* row = static_cast<const BFloat16*>(source);
      for (; i < count; ++i) destination[i] = static_cast<Real>(attention::to_float(row[i]));
      return;
    }
    case DataType::kFloat16: {
      const Float16* row = static_cast<const Float16*>(source);
#if defined(__F16C__)
      if constexpr (sizeof(Real) == 4) {
        for (; i + 8 <= count; i += 8) {
          _mm256_storeu_ps(
              destination + i,
              _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
        }
      }
#endif
      for (; i < count; ++i) destination[i] = static_cast<Real>(attention::to_float(row[i]));
      return;
    }
    case DataType::kFloat8E4M3: {
      const Float8E4M3* row = static_cast<const Float8E4M3*>(source);
      for (; i < count; ++i)
        destination[i] = static_cast<Real>(attention::to_float(row[i])) * scale;
      return;
    }
    case DataType::kInt8: {
      const Int8* row = static_cast<const Int8*>(source);
      for (; i < count; ++i)
        destination[i] = static_cast<Real>(attention::to_float(row[i])) * scale;
      return;
    }
  }
}

// destination[i] = source[i] * scale, rounded to the element type.
template <class Real>
SA_INLINE void store_row(const Real* source, int64_t count, Real scale, void* destination,
                         DataType dtype) {
  int64_t i = 0;
  switch (dtype) {
    case DataType::kFloat64: {
      double* row = static_cast<double*>(destination);
      for (; i < count; ++i) row[i] = static_cast<double>(source[i] * scale);
      return;
    }
    case DataType::kFloat32: {
      float* row = static_cast<float*>(destination);
      for (; i < count; ++i) row[i] = static_cast<float>(source[i] * scale);
      return;
    }
    case DataType::kBFloat16: {
      BFloat16* row = static_cast<BFloat16*>(destination);
      for (; i < count; ++i) row[i] = attention::to_bfloat16(static_cast<float>(source[i] * scale));
      return;
    }
    case DataType::kFloat16: {
      Float16* row = static_cast<Float16*>(destination);
#if defined(__F16C__)
      if constexpr (sizeof(Real) == 4) {
        const __m256 factor = _mm256_set1_ps(scale);
        for (; i + 8 <= count; i += 8) {
          const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(source + i), factor);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                           _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        }
      }
#endif
      for (; i < count; ++i) row[i] = attention::to_float16(static_cast<float>(source[i] * scale));
      return;
    }
    case DataType::kFloat8E4M3: {
      Float8E4M3* row = static_cast<Float8E4M3*>(destination);
      for (; i < count; ++i)
        row[i] = attention::to_float8_e4m3(static_cast<float>(source[i] * scale));
      return;
    }
    case DataType::kInt8: {
      Int8* row = static_cast<Int8*>(destination);
      for (; i < count; ++i) row[i] = attention::to_int8(static_cast<float>(source[i] * scale));
      return;
    }
  }
}

}  // namespace sink_attention::cpu::SA_ISA
