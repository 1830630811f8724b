#pragma once

#include <cmath>

#include "emulator/machine.h"

namespace sink_attention::primitives {

// Subnormal inputs and results are flushed, as the instruction's .ftz does.
SA_DEVICE float exp2_approx(float x, emulator::Site site = emulator::here()) {
  emulator::refuse_poison(x, "exp2_approx", site);
  const float result = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}
SA_DEVICE float reciprocal_approx(float x, emulator::Site site = emulator::here()) {
  emulator::refuse_poison(x, "reciprocal_approx", site);
  const float result = 1.0f / (std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x);
  return std::fpclassify(result) == FP_SUBNORMAL ? std::copysign(0.0f, result) : result;
}

}  // namespace sink_attention::primitives
