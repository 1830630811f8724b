#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

namespace internal {
struct Mma {
  float* acc;
  const uint32_t* a;
  const uint32_t* b;
};

template <class Element>
float half_of(uint32_t pair, int half) {
  return attention::to_float(Element{static_cast<uint16_t>(pair >> (16 * half))});
}

// The tables of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", where
// groupID = lane >> 2 and threadID_in_group = lane % 4:
//   A   row = groupID            for ai where 0 <= i < 2 || 4 <= i < 6, else groupID + 8
//       col = threadID_in_group * 2 + (i & 1)   for ai where i < 4, else + 8
//   B   row = threadID_in_group * 2 + (i & 1)   for bi where i < 2, else + 8;   col = groupID
//   C   row = groupID            for ci where i < 2, else groupID + 8
//       col = threadID_in_group * 2 + (i & 1)
template <class Element>
void mma_m16n8k16_of(void* const* lanes) {
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& of = *static_cast<Mma*>(lanes[lane]);
    const int group = lane >> 2;
    const int in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][col] = half_of<Element>(of.a[i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b[row][group] = half_of<Element>(of.b[i / 2], i & 1);
    }
  }
  float product[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& of = *static_cast<Mma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      of.acc[i] += product[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)];
    }
  }
}
}  // namespace internal

template <class Element>
SA_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulator::Site site = emulator::here()) {
  internal::Mma mine{acc, a, b};
  emulator::collective({"mma_m16n8k16", site}, &mine, internal::mma_m16n8k16_of<Element>);
}

}  // namespace sink_attention::primitives
