// Conversions, over all of the small formats: each number survives the way to float and back, and
// every float lands on the nearest number, ties to even.
#include <cmath>

#include "attention/numeric.h"
#include "check.h"

namespace sink_attention::tests {
namespace {

using attention::BFloat16;
using attention::Float16;
using attention::Float8E4M3;
using attention::Int8;

// Of the bit patterns [0, num_positive), ascending numbers: checks each, the middle to the next
// one, and beside it.
template <class Number, class Bits, class Round>
void check_rounding(const char* name, int num_positive, const Round& round) {
  for (int bits = 0; bits < num_positive; ++bits) {
    const float value = attention::to_float(Number{static_cast<Bits>(bits)});
    check(round(value).bits == bits, name, " ", bits, " -> ", value, " -> ", round(value).bits);
    if (bits + 1 == num_positive) break;
    const float next = attention::to_float(Number{static_cast<Bits>(bits + 1)});
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
  // In bfloat16 the floats between two numbers are float subnormals at the start: exact all the
  // same.
  check_rounding<BFloat16, uint16_t>("bfloat16", 0x7f80,
                                     [](float x) { return attention::to_bfloat16(x); });
  check_rounding<Float16, uint16_t>("float16", 0x7c00,
                                    [](float x) { return attention::to_float16(x); });
  check_rounding<Float8E4M3, uint8_t>("float8_e4m3", 0x7f,
                                      [](float x) { return attention::to_float8_e4m3(x); });
  for (int number = -127; number <= 127; ++number) {
    const float value = static_cast<float>(number);
    const float middle = value + 0.5f;
    check(attention::to_float(Int8{static_cast<int8_t>(number)}) == value, "int8 ", number);
    check(attention::to_int8(value).bits == number, "int8 ", number, " does not come back");
    if (number == 127) break;
    check(attention::to_int8(middle).bits == (number % 2 == 0 ? number : number + 1),
          "int8 tie after ", number);
    check(attention::to_int8(std::nextafter(middle, -1e9f)).bits == number, "int8 below the tie");
    check(attention::to_int8(std::nextafter(middle, 1e9f)).bits == number + 1, "int8 above it");
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
