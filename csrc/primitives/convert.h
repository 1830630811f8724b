// Conversion between float32 and narrower types, rounding to nearest even.
//
//   uint32_t pack<Element>(float low, float high)
//        Two BFloat16 or Float16 elements in a register.
//   void unpack<Element>(uint32_t pair, float& low, float& high)
//   uint32_t pack_e4m3(float a, float b, float c, float d)
//        Four Float8E4M3 elements, a in the lowest byte; saturates to +-448. Compute capability 8.9
//        and later.
#pragma once

#include <type_traits>

#include "attention/numeric.h"
#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/convert.h"
#else
#include "primitives/ptx/convert.h"
#endif

namespace sink_attention::primitives {

template <class Element>
SA_DEVICE void unpack(uint32_t pair, float& low, float& high) {
  if constexpr (std::is_same_v<Element, attention::BFloat16>) {
    low = attention::float_of(pair << 16);
    high = attention::float_of(pair & 0xffff0000u);
  } else {
    low = half_to_float({static_cast<uint16_t>(pair)});
    high = half_to_float({static_cast<uint16_t>(pair >> 16)});
  }
}

}  // namespace sink_attention::primitives
