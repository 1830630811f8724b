// Conversions of all values of the small formats: each survives the way to float and back, and
// every float is rounded to the nearest value, ties to even.
#include <cmath>

#include "attention/numeric.h"
#include "check.h"

namespace sink_attention::tests {
namespace {

using attention::BFloat16;
using attention::Float16;
using attention::Float8E4M3;
using attention::Int8;

// The bit patterns [0, num_positive) are ascending values. Checks each value, the middle to the
// next one, and the floats beside the middle.
template <class Format, class Bits, class Round>
void check_rounding(const char* name, int num_positive, const Round& round) {
  for (int bits = 0; bits < num_positive; ++bits) {
    const float value = attention::to_float(Format{static_cast<Bits>(bits)});
    check(round(value).bits == bits, name, " ", bits, " -> ", value, " -> ", round(value).bits);
    if (bits + 1 == num_positive) break;
    const float next = attention::to_float(Format{static_cast<Bits>(bits + 1)});
    check(value < next, name, " ", bits, " is not below its successor");
    const float middle = static_cast<float>((static_cast<double>(value) + next) / 2);
    check(round(middle).bits == bits + bits % 2, name, " tie after ", bits, " -> ",
          round(middle).bits);
    check(round(std::nextafter(middle, value)).bits == bits, name, " just below the tie after ",
          bits);
    check(round(std::nextafter(middle, next)).bits == bits + 1, name, " just above the tie after ",
          bits);
    const Bits sign = static_cast<Bits>(1u << (sizeof(Bits) * 8 - 1));
    check(round(-value).bits == (bits | sign), name, " -", value, " -> ", round(-value).bits);
  }
  check(std::isnan(attention::to_float(round(NAN))), name, " NaN must stay NaN");
}

}  // namespace

SA_SUITE(numeric) {
  // The floats between the smallest bfloat16 values are subnormal, and still exact.
  check_rounding<BFloat16, uint16_t>("bfloat16", 0x7f80,
                                     [](float x) { return attention::to_bfloat16(x); });
  check_rounding<Float16, uint16_t>("float16", 0x7c00,
                                    [](float x) { return attention::to_float16(x); });
  check_rounding<Float8E4M3, uint8_t>("float8_e4m3", 0x7f,
                                      [](float x) { return attention::to_float8_e4m3(x); });
  for (int integer = -127; integer <= 127; ++integer) {
    const float value = static_cast<float>(integer);
    const float middle = value + 0.5f;
    check(attention::to_float(Int8{static_cast<int8_t>(integer)}) == value, "int8 ", integer);
    check(attention::to_int8(value).bits == integer, "int8 ", integer, " does not come back");
    if (integer == 127) break;
    check(attention::to_int8(middle).bits == (integer % 2 == 0 ? integer : integer + 1),
          "int8 tie after ", integer);
    check(attention::to_int8(std::nextafter(middle, -1e9f)).bits == integer, "int8 below the tie");
    check(attention::to_int8(std::nextafter(middle, 1e9f)).bits == integer + 1, "int8 above it");
  }
  check(attention::to_int8(1e30f).bits == 127 && attention::to_int8(INFINITY).bits == 127,
        "int8 saturates");
  check(attention::to_int8(-128.0f).bits == -127 && attention::to_int8(-INFINITY).bits == -127,
        "int8 saturates at -127");
  check(attention::to_int8(NAN).bits == 0, "NaN as int8 is 0");
  check(attention::finite_magnitude(-INFINITY) == 0 && attention::finite_magnitude(NAN) == 0,
        "what is not finite does not count");
  const uint32_t largest = attention::finite_magnitude(-3.5f);
  check(attention::row_scale<Int8>(largest) == 3.5f / 127.0f, "the scale of an int8 row");
  check(attention::row_scale<Float8E4M3>(largest) == 3.5f / 448.0f, "the scale of a float8 row");
  check(attention::row_scale<Int8>(0) == 1.0f && attention::row_scale<Int8>(1) == 1.0f,
        "the scale of a row of zeros");
  check(attention::to_float(attention::to_float16(INFINITY)) == INFINITY, "float16 infinity");
  check(attention::to_float(attention::to_float16(65519.0f)) == 65504.0f, "float16 largest");
  check(attention::to_float(attention::to_float16(65520.0f)) == INFINITY, "float16 overflow");
  check(attention::to_float(attention::to_bfloat16(-INFINITY)) == -INFINITY, "bfloat16 infinity");
  check(attention::to_float(attention::to_float8_e4m3(1e9f)) == 448.0f, "float8 saturates");
  check(attention::to_float(attention::to_float8_e4m3(-INFINITY)) == -448.0f, "float8 saturates");
}

}  // namespace sink_attention::tests
