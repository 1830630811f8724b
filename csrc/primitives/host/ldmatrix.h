#pragma once

#include <cstring>

#include "emulator/machine.h"

namespace sink_attention::primitives {

namespace internal {
struct Ldmatrix {
  const void* row;
  uint32_t* r;
};

// PTX ISA, ldmatrix: "each thread is assigned a fragment of a row": thread 0 elements 0 and 1 of
// row 0, thread 1 elements 2 and 3, ..., thread 4 elements 0 and 1 of row 1.
inline void ldmatrix(void* const* lanes, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row) {
      memcpy(rows[row], static_cast<Ldmatrix*>(lanes[matrix * 8 + row])->row, 16);
    }
    int lane = 0;
    for (int major = 0; major < 8; ++major) {
      for (int pair = 0; pair < 4; ++pair, ++lane) {
        const uint16_t low = transposed ? rows[2 * pair][major] : rows[major][2 * pair];
        const uint16_t high = transposed ? rows[2 * pair + 1][major] : rows[major][2 * pair + 1];
        static_cast<Ldmatrix*>(lanes[lane])->r[matrix] = low | uint32_t{high} << 16;
      }
    }
  }
}
}  // namespace internal

SA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                           emulator::Site site = emulator::here()) {
  emulator::read_shared(row, 16, {"ldmatrix_x4", site});
  internal::Ldmatrix mine{row, r};
  emulator::collective({"ldmatrix_x4", site}, &mine,
                       [](void* const* lanes) { internal::ldmatrix(lanes, false); });
}
SA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                                 emulator::Site site = emulator::here()) {
  emulator::read_shared(row, 16, {"ldmatrix_x4_trans", site});
  internal::Ldmatrix mine{row, r};
  emulator::collective({"ldmatrix_x4_trans", site}, &mine,
                       [](void* const* lanes) { internal::ldmatrix(lanes, true); });
}

}  // namespace sink_attention::primitives
