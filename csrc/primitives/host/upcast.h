#pragma once

#include <cstring>

namespace sink_attention::primitives {

template <class Stored>
SA_DEVICE void upcast(uint32_t four, uint32_t& low, uint32_t& high) {
  Stored elements[4];
  memcpy(elements, &four, sizeof(elements));
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i)
    bits[i] = attention::to_float16(attention::to_float(elements[i])).bits;
  low = bits[0] | bits[1] << 16;
  high = bits[2] | bits[3] << 16;
}

SA_DEVICE uint32_t swap_middle_bytes(uint32_t four) {
  return (four & 0xff0000ffu) | (four & 0x0000ff00u) << 8 | (four & 0x00ff0000u) >> 8;
}

SA_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t eight = low | uint64_t{high} << 32;
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    four |= static_cast<uint32_t>(eight >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return four;
}

}  // namespace sink_attention::primitives
