// Conversions and approximate functions of the emulated primitives.
#include <cmath>
#include <cstring>
#include <random>

#include "emulated.h"
#include "primitives/upcast.h"

namespace sink_attention::tests {
namespace {

// Rounds to the nearest of the neighbouring values, ties to even, by comparing distances.
template <class Element>
uint16_t nearest(float value) {
  const float magnitude = std::fabs(value);
  uint16_t low = 0;
  for (uint16_t step = 0x4000; step != 0; step = static_cast<uint16_t>(step / 2)) {
    const uint16_t trial = low + step;
    if (attention::to_float(Element{trial}) <= magnitude) low = trial;
  }
  const double below = attention::to_float(Element{low});
  const double above = attention::to_float(Element{static_cast<uint16_t>(low + 1)});
  const double to_below = magnitude - below;
  const double to_above = above - magnitude;
  const bool up = to_above < to_below || (to_above == to_below && low % 2 == 1);
  return static_cast<uint16_t>((low + (up ? 1 : 0)) | (std::signbit(value) ? 0x8000 : 0));
}

template <class Element>
void check_conversions(const char* name, float largest) {
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    float pair[2];
    for (float& value : pair) {
      do {
        value = attention::float_of(random());
      } while (!(std::fabs(value) <= largest));
      if (i % 2 == 0) value = std::ldexp(value, -std::ilogb(value == 0 ? 1 : value));
    }
    const uint32_t packed = pack<Element>(pair[0], pair[1]);
    const uint32_t expected =
        nearest<Element>(pair[0]) | static_cast<uint32_t>(nearest<Element>(pair[1])) << 16;
    check(packed == expected, name, " pack(", pair[0], ", ", pair[1], "): ", packed, " for ",
          expected);
    float low = 0;
    float high = 0;
    unpack<Element>(packed, low, high);
    check(low == attention::to_float(Element{static_cast<uint16_t>(expected)}) &&
              high == attention::to_float(Element{static_cast<uint16_t>(expected >> 16)}),
          name, " unpack of ", packed);
  }
}

// A tie, the values beside it, and infinity, in the low and in the high half.
template <class Element>
void check_ties(const char* name, float tie_to_even, float even, float tie_up, float up) {
  float low = 0;
  float high = 0;
  unpack<Element>(pack<Element>(tie_to_even, tie_up), low, high);
  check(low == even && high == up, name, " ties: ", low, " ", high);
  unpack<Element>(pack<Element>(INFINITY, -INFINITY), low, high);
  check(low == INFINITY && high == -INFINITY, name, " infinities");
  unpack<Element>(pack<Element>(NAN, -0.0f), low, high);
  check(std::isnan(low) && high == 0 && std::signbit(high), name, " NaN and -0");
}

float value_of(attention::Int8 value) { return value.bits; }
float value_of(attention::Float8E4M3 value) {
  const int exponent = value.bits >> 3 & 15;
  const int mantissa = value.bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (value.bits & 0x80) != 0 ? -magnitude : magnitude;
}

// Each value in each of the four bytes.
template <class Stored>
void check_widening(const char* name) {
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint8_t bytes[4];
    for (uint32_t i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(byte + 67 * i);
    uint32_t four = 0;
    memcpy(&four, bytes, sizeof(four));
    uint32_t pairs[2];
    upcast<Stored>(four, pairs[0], pairs[1]);
    for (int i = 0; i < 4; ++i) {
      Stored stored;
      memcpy(&stored, &bytes[i], 1);
      float found[2];
      unpack<attention::Float16>(pairs[i / 2], found[0], found[1]);
      const float expected = value_of(stored);
      check(found[i % 2] == expected || (std::isnan(found[i % 2]) && std::isnan(expected)), name,
            " upcast: byte ", i, " of ", four, ": ", found[i % 2], " for ", expected);
    }
  }
}

// All float16 values: rounded to the nearest e4m3 value by distances, saturated, in each of the
// four bytes.
void check_e4m3() {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const float value = attention::to_float(attention::Float16{static_cast<uint16_t>(bits)});
    const uint32_t packed = pack_e4m3(1.0f, value, -2.0f, value);
    check((packed & 0xff00ffu) == 0xc00038u, "pack_e4m3's bytes 0 and 2: ", packed);
    const uint8_t byte = static_cast<uint8_t>(packed >> 8);
    check(byte == packed >> 24, "pack_e4m3's bytes 1 and 3: ", packed);
    if (std::isnan(value)) {
      check((byte & 0x7f) == 0x7f, "pack_e4m3 of NaN");
      continue;
    }
    double nearest = INFINITY;  // the least distance to any of them
    for (int code = 0; code < 0x100; ++code) {
      if ((code & 0x7f) == 0x7f) continue;
      const double other = attention::to_float(attention::Float8E4M3{static_cast<uint8_t>(code)});
      nearest = std::fmin(nearest, std::fabs(other - value));
    }
    const float result = attention::to_float(attention::Float8E4M3{byte});
    check(std::isinf(value) ? result == std::copysign(448.0f, value)
                            : std::fabs(double{result} - value) == nearest,
          "pack_e4m3(", value, ") is ", result);
    // Of two that are equally near, the one with the even code.
    const uint8_t before = static_cast<uint8_t>(byte - 1);
    const uint8_t after = static_cast<uint8_t>(byte + 1);
    for (const uint8_t neighbour : {before, after}) {
      const bool is_one = (neighbour & 0x7f) != 0x7f && (neighbour ^ byte) < 0x80;
      const double other = attention::to_float(attention::Float8E4M3{neighbour});
      if (is_one && std::isfinite(value) && std::fabs(other - value) == nearest) {
        check(byte % 2 == 0, "pack_e4m3 of a tie, ", value, ", is ", result);
      }
    }
    check(std::signbit(value) == (byte >> 7 != 0), "pack_e4m3's sign of ", value);
  }
}

}  // namespace

SA_SUITE(emulated_numbers) {
  check_e4m3();
  check(select_bytes(0x33221100u, 0x77665544u, 0x6420) == 0x66442200u, "select_bytes: even ones");
  check(select_bytes(0x33221100u, 0x77665544u, 0x7531) == 0x77553311u, "select_bytes: odd ones");
  check(select_bytes(0x33221100u, 0x77665544u, 0x0370) == 0x00337700u, "select_bytes");
  check_conversions<attention::BFloat16>("bfloat16", 3e38f);
  check_conversions<attention::Float16>("float16", 65504.0f);
  check_ties<attention::BFloat16>("bfloat16", 1 + 0x1p-8f, 1.0f, 1 + 3 * 0x1p-8f, 1 + 0x1p-6f);
  check_ties<attention::Float16>("float16", 1 + 0x1p-11f, 1.0f, 1 + 3 * 0x1p-11f, 1 + 0x1p-9f);

  check_widening<attention::Float8E4M3>("float8");
  check_widening<attention::Int8>("int8");
  check(swap_middle_bytes(0x44332211u) == 0x44223311u, "bytes 0, 2, 1, 3");

  check(exp2_approx(0.0f) == 1.0f, "exp2(0)");
  check(exp2_approx(-INFINITY) == 0.0f, "exp2(-inf)");
  check(exp2_approx(INFINITY) == INFINITY, "exp2(inf)");
  check(std::isnan(exp2_approx(NAN)), "exp2(NaN)");
  check(exp2_approx(128.0f) == INFINITY, "exp2 overflows");
  check(exp2_approx(-126.0f) == 0x1p-126f, "exp2 of the smallest normal result");
  check(exp2_approx(-126.5f) == 0.0f, "exp2: a subnormal result is 0");
  check(exp2_approx(1e-40f) == 1.0f, "exp2 of a subnormal");
  for (float x = -20; x < 20; x += 0.37f) {
    check(std::fabs(exp2_approx(x) / std::exp2(static_cast<double>(x)) - 1) < 3e-7, "exp2 of ", x);
  }
  check(reciprocal_approx(4.0f) == 0.25f, "1 / 4");
  check(reciprocal_approx(INFINITY) == 0.0f, "1 / inf");
  check(reciprocal_approx(0.0f) == INFINITY, "1 / 0");
  check(reciprocal_approx(-0.0f) == -INFINITY, "1 / -0");
  check(reciprocal_approx(-1e-40f) == -INFINITY, "1 / a subnormal, which counts as 0");
  check(reciprocal_approx(0x1p127f) == 0.0f, "1 / x: a subnormal result is 0");
}

}  // namespace sink_attention::tests
