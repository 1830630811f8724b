// Sums and maxima along the rows of accumulators. The 4 lanes of a quad hold a row (fragment.cuh).
#pragma once

#include "cuda/tile/fragment.cuh"
#include "primitives/warp.h"

namespace sink_attention::cuda {

SA_DEVICE float quad_max(float value) {
  const float other = primitives::shfl_xor(value, 1);
  value = value > other ? value : other;
  const float far = primitives::shfl_xor(value, 2);
  return value > far ? value : far;
}

SA_DEVICE float quad_sum(float value) {
  value += primitives::shfl_xor(value, 1);
  return value + primitives::shfl_xor(value, 2);
}

}  // namespace sink_attention::cuda
