#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

namespace internal {
struct Mma {
  float* acc;
  const uint32_t* a;
  const uint32_t* b;
};

// GCC's and Clang's vector extension: operators work on all four elements.
using FourFloats = float __attribute__((vector_size(16)));

template <class Element>
void unpack_to(float* two, uint32_t pair) {
  two[0] = attention::to_float(Element{static_cast<uint16_t>(pair)});
  two[1] = attention::to_float(Element{static_cast<uint16_t>(pair >> 16)});
}

// The tables of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", where
// groupID = lane >> 2 and threadID_in_group = lane % 4:
//
//   A   row = groupID         for ai where 0 <= i < 2 || 4 <= i < 6, else groupID + 8
//       col = threadID_in_group * 2 + (i & 1)    for ai where i < 4, else + 8
//   B   row = threadID_in_group * 2 + (i & 1)    for bi where i < 2, else + 8
//       col = groupID
//   C   row = groupID         for ci where i < 2, else groupID + 8
//       col = threadID_in_group * 2 + (i & 1)
//
// Elements 2 r and 2 r + 1 are the low and the high half of register r.
template <class Element>
void mma_m16n8k16_of(void* const* lanes) {
  float a[16][16];
  float b[8][16];  // transposed, so that the two elements of a register are neighbours
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& of = *static_cast<Mma*>(lanes[lane]);
    const int group = lane >> 2;
    const int in_group = lane % 4;
    for (int i = 0; i < 8; i += 2) {
      const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i < 4 ? 0 : 8);
      unpack_to<Element>(&a[row][col], of.a[i / 2]);
    }
    for (int i = 0; i < 4; i += 2) {
      const int row = in_group * 2 + (i < 2 ? 0 : 8);
      unpack_to<Element>(&b[group][row], of.b[i / 2]);
    }
  }
  FourFloats b_rows[16][2];
  for (int k = 0; k < 16; ++k) {
    b_rows[k][0] = FourFloats{b[0][k], b[1][k], b[2][k], b[3][k]};
    b_rows[k][1] = FourFloats{b[4][k], b[5][k], b[6][k], b[7][k]};
  }
  for (int m = 0; m < 16; ++m) {
    FourFloats product[2] = {};
    for (int k = 0; k < 16; ++k) {
      product[0] += a[m][k] * b_rows[k][0];
      product[1] += a[m][k] * b_rows[k][1];
    }
    for (int pair = 0; pair < 4; ++pair) {
      float* acc = static_cast<Mma*>(lanes[m % 8 * 4 + pair])->acc + m / 8 * 2;
      acc[0] += product[pair / 2][pair % 2 * 2];
      acc[1] += product[pair / 2][pair % 2 * 2 + 1];
    }
  }
}
}  // namespace internal

template <class Element>
SA_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulator::Site site = emulator::here()) {
  for (const float sum : acc) emulator::refuse_poison(sum, "mma_m16n8k16", site);
  internal::Mma mine{acc, a, b};
  emulator::collective({"mma_m16n8k16", site}, &mine, internal::mma_m16n8k16_of<Element>);
}

}  // namespace sink_attention::primitives
