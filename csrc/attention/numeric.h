// Conversions between float and bfloat16, float16, float8 e4m3 and int8, on bits, rounding to
// nearest even; and the scale of a row of an 8-bit cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/host_device.h"

namespace sink_attention::attention {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// 1 sign, 4 exponent (bias 7) and 3 mantissa bits. The largest value is 448; there is no infinity;
// 0x7f and 0xff are NaN.
struct Float8E4M3 {
  uint8_t bits;
};
// -127 .. 127: symmetric, since a scale has no zero point.
struct Int8 {
  int8_t bits;
};

SA_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SA_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SA_HOST_DEVICE float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

SA_HOST_DEVICE float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  // The factor 2^112 changes the exponent's bias from 15 to 127, and makes subnormals normal.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// By masks, without branches: GCC does not vectorise a loop with branches for AVX2.
SA_HOST_DEVICE float to_float(Float8E4M3 value) {
  const uint32_t sign = uint32_t{value.bits & 0x80u} << 24;
  const uint32_t magnitude = value.bits & 0x7fu;
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(magnitude < 8u);
  const uint32_t is_nan = 0u - static_cast<uint32_t>(magnitude == 0x7fu);
  const uint32_t normal = (magnitude << 20) + (120u << 23);  // the exponent's bias: 7 -> 127
  // A subnormal is m / 8 * 2^-6 = (1 + m / 8) * 2^-6 - 2^-6.
  const uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - 0x1p-6f);
  const uint32_t value_bits = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return float_of(sign | value_bits | (is_nan & 0x7fc00000u));
}

SA_HOST_DEVICE float to_float(Int8 value) { return static_cast<float>(value.bits); }

SA_HOST_DEVICE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // stay NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

SA_HOST_DEVICE Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to inf
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the mantissa to units of 2^-24
    const uint32_t aligned = bits_of(float_of(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (aligned - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Saturates to +-448, as KV caches want; NaN stays NaN.
SA_HOST_DEVICE Float8E4M3 to_float8_e4m3(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7fu)};
  if (magnitude >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7eu)};  // 448 and more
  if (magnitude < 0x3c800000u) {  // below 2^-6: adding 2^14 aligns the mantissa to units of 2^-9
    const uint32_t aligned = bits_of(float_of(magnitude) + 0x1p14f);
    return {static_cast<uint8_t>(sign | (aligned - 0x46800000u))};
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return {static_cast<uint8_t>(sign | ((rounded - 0x3c000000u) >> 20))};
}

// Saturates to +-127; NaN, which int8 lacks, becomes 0.
SA_HOST_DEVICE Int8 to_int8(float value) {
  const float below = value < 127.0f ? value : (value >= 127.0f ? 127.0f : 0.0f);
  const float inside = below > -127.0f ? below : -127.0f;
  // Adding 1.5 * 2^23 aligns the mantissa to units of 1.
  return {static_cast<int8_t>(bits_of(inside + 0x1.8p23f) - 0x4b400000u)};
}

// The element types of an 8-bit cache: the largest value, and the conversion.
template <class Stored>
constexpr float kLargest = 448.0f;
template <>
constexpr float kLargest<Int8> = 127.0f;
template <class Stored>
SA_HOST_DEVICE Stored to_stored(float value);
template <>
SA_HOST_DEVICE Float8E4M3 to_stored<Float8E4M3>(float value) {
  return to_float8_e4m3(value);
}
template <>
SA_HOST_DEVICE Int8 to_stored<Int8>(float value) {
  return to_int8(value);
}

// A row with its own scale: its largest finite magnitude is stored as kLargest. Magnitudes are
// compared as bits, which have the same order. Infinities and NaN count as 0.
SA_HOST_DEVICE uint32_t finite_magnitude(float value) {
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  return magnitude < 0x7f800000u ? magnitude : 0u;
}
// 1 for a row of zeros, or of values so small that the quotient is 0.
template <class Stored>
SA_HOST_DEVICE float row_scale(uint32_t largest_magnitude) {
  const float scale = float_of(largest_magnitude) / kLargest<Stored>;
  return scale > 0.0f ? scale : 1.0f;
}

}  // namespace sink_attention::attention
