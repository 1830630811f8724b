#pragma once

namespace sink_attention::primitives {

template <class Element>
SA_DEVICE uint32_t pack(float low, float high);

// PTX ISA 9.7.9.21, cvt: the first operand goes to the upper half.
template <>
SA_DEVICE uint32_t pack<attention::BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
SA_DEVICE uint32_t pack<attention::Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

SA_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t four;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(four)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}

SA_DEVICE float half_to_float(attention::Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(result) : "h"(value.bits));
  return result;
}

}  // namespace sink_attention::primitives
