#pragma once

namespace sink_attention::primitives {

template <class Stored>
SA_DEVICE void upcast(uint32_t four, uint32_t& low, uint32_t& high);

// PTX ISA 9.7.9.21, cvt.
template <>
SA_DEVICE void upcast<attention::Float8E4M3>(uint32_t four, uint32_t& low, uint32_t& high) {
  asm("{\n"
      ".reg .b16 first, second;\n"
      "mov.b32 {first, second}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;\n"
      "}\n"
      : "=r"(low), "=r"(high)
      : "r"(four));
}
// As Float16, 0x64uu is 1024 + uu, where uu is the int8 value + 128.
template <>
SA_DEVICE void upcast<attention::Int8>(uint32_t four, uint32_t& low, uint32_t& high) {
  asm("{\n"
      ".reg .b32 shifted, first, second;\n"
      "xor.b32 shifted, %2, 0x80808080;\n"
      "prmt.b32 first, shifted, 0x64646464, 0x4140;\n"
      "prmt.b32 second, shifted, 0x64646464, 0x4342;\n"
      "sub.f16x2 %0, first, %3;\n"
      "sub.f16x2 %1, second, %3;\n"
      "}\n"
      : "=r"(low), "=r"(high)
      : "r"(four), "r"(0x64806480u));
}

SA_DEVICE uint32_t swap_middle_bytes(uint32_t four) { return __byte_perm(four, 0, 0x3120); }
SA_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}

}  // namespace sink_attention::primitives
