// Conversions of single elements between every dtype and the compute type Real.
#pragma once

#include <type_traits>

#include "attention/numeric.h"
#include "attention/params.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

template <class Real, class Element>
SA_DEVICE Real to_real(Element value) {
  if constexpr (std::is_arithmetic_v<Element>) {
    return static_cast<Real>(value);
  } else {
    return static_cast<Real>(attention::to_float(value));
  }
}

template <class Element, class Real>
SA_DEVICE Element from_real(Real value) {
  if constexpr (std::is_arithmetic_v<Element>) {
    return static_cast<Element>(value);
  } else if constexpr (std::is_same_v<Element, attention::BFloat16>) {
    return attention::to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<Element, attention::Float16>) {
    return attention::to_float16(static_cast<float>(value));
  } else {
    return attention::to_stored<Element>(static_cast<float>(value));
  }
}

template <class Real, class Element>
SA_DEVICE Real load_as(const void* base, int64_t idx) {
  return to_real<Real>(primitives::load_global(static_cast<const Element*>(base) + idx));
}

// Element idx of an array in global memory whose dtype is known at run time only.
template <class Real>
SA_DEVICE Real load_element(const void* base, attention::DataType dtype, int64_t idx) {
  switch (dtype) {
    case attention::DataType::kFloat64:
      return load_as<Real, double>(base, idx);
    case attention::DataType::kFloat32:
      return load_as<Real, float>(base, idx);
    case attention::DataType::kFloat16:
      return load_as<Real, attention::Float16>(base, idx);
    default:
      return load_as<Real, attention::BFloat16>(base, idx);
  }
}

}  // namespace sink_attention::cuda
