#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

namespace internal {
inline attention::BFloat16 from_float(float value, attention::BFloat16) {
  return attention::to_bfloat16(value);
}
inline attention::Float16 from_float(float value, attention::Float16) {
  return attention::to_float16(value);
}
}  // namespace internal

template <class Element>
SA_DEVICE uint32_t pack(float low, float high, emulator::Site site = emulator::here()) {
  emulator::refuse_poison(low, "pack", site);
  emulator::refuse_poison(high, "pack", site);
  const uint32_t pair = internal::from_float(low, Element{}).bits |
                        uint32_t{internal::from_float(high, Element{}).bits} << 16;
  if (emulator::PackLog* log = emulator::pack_log()) log->add(pair);
  return pair;
}

SA_DEVICE float half_to_float(attention::Float16 value) { return attention::to_float(value); }

}  // namespace sink_attention::primitives
