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

SA_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d,
                             emulator::Site site = emulator::here()) {
  uint32_t four = 0;
  int shift = 0;
  for (const float value : {a, b, c, d}) {
    emulator::refuse_poison(value, "pack_e4m3", site);
    four |= uint32_t{attention::to_float8_e4m3(value).bits} << shift;
    shift += 8;
  }
  if (emulator::PackLog* log = emulator::pack_log()) log->add(four);
  return four;
}

SA_DEVICE float half_to_float(attention::Float16 value) { return attention::to_float(value); }

}  // namespace sink_attention::primitives
