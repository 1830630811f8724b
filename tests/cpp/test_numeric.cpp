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
  check(attention::to_float(attention::to_float16(INFINITY)) == INFINITY, "float16 infinity");
  check(attention::to_float(attention::to_float16(65519.0f)) == 65504.0f, "float16 largest");
  check(attention::to_float(attention::to_float16(65520.0f)) == INFINITY, "float16 overflow");
  check(attention::to_float(attention::to_bfloat16(-INFINITY)) == -INFINITY, "bfloat16 infinity");
  check(attention::to_float(attention::to_float8_e4m3(1e9f)) == 448.0f, "float8 saturates");
  check(attention::to_float(attention::to_float8_e4m3(-INFINITY)) == -448.0f, "float8 saturates");
}

}  // namespace sink_attention::tests
