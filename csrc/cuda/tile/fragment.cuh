// Which lane of a warp holds which element of a matrix product's operands (mma.m16n8k16).
//
//   accumulator C, 16 x 8, float c[4]
//     lane = 4 * (row % 8) + col / 2,  reg = 2 * (row / 8) + col % 2
//
//            col 0   1   2   3   4   5   6   7
//     row 0   lane 0   |   1   |   2   |   3        c[0], c[1] of each lane
//     row 1        4   |   5   |   6   |   7
//     ...
//     row 7       28   |  29   |  30   |  31
//     row 8        0   |   1   |   2   |   3        c[2], c[3]
//     ...
//
//   operand A, 16 x 16, uint32_t a[4], with row = lane / 4, col = 2 * (lane % 4)
//     a[0]   (row,     col    ), (row,     col + 1)       the first in the low half of the word
//     a[1]   (row + 8, col    ), (row + 8, col + 1)
//     a[2]   (row,     col + 8), (row,     col + 9)
//     a[3]   (row + 8, col + 8), (row + 8, col + 9)
//
//   operand B, 16 x 8 (k x n), uint32_t b[2], with k = 2 * (lane % 4), n = lane / 4
//     b[0]   (k,     n), (k + 1, n)
//     b[1]   (k + 8, n), (k + 9, n)
//
// So two neighbouring accumulators, 16 x 16 elements, are an operand A once they are packed to 16
// bits. P therefore stays in registers between Q K^T and P V.
#pragma once

#include "attention/host_device.h"
#include "primitives/convert.h"
#include "primitives/simt.h"

namespace sink_attention::cuda {

SA_HOST_DEVICE constexpr int accumulator_row(int lane, int reg) { return lane / 4 + reg / 2 * 8; }
SA_HOST_DEVICE constexpr int accumulator_col(int lane, int reg) { return lane % 4 * 2 + reg % 2; }

// A warp's accumulators: kTilesM x kTilesN fragments of 16 x 8.
template <int kTilesM_, int kTilesN_>
struct Accumulators {
  static constexpr int kTilesM = kTilesM_;
  static constexpr int kTilesN = kTilesN_;
  float c[kTilesM][kTilesN][4];

  template <class Visit>
  SA_DEVICE void for_each(Visit visit) {
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int reg = 0; reg < 4; ++reg) visit(c[m][n][reg]);
      }
    }
  }
  SA_DEVICE void clear() {
    for_each([](float& value) { value = 0.0f; });
  }
};

// Operand A for rows [16 m, 16 m + 16) and columns [16 k, 16 k + 16) of `from`, rounded to Element.
template <class Element, int kTilesM, int kTilesN>
SA_DEVICE void to_operand_a(const Accumulators<kTilesM, kTilesN>& from, int m, int k,
                            uint32_t (&a)[4]) {
  const float (&left)[4] = from.c[m][2 * k];
  const float (&right)[4] = from.c[m][2 * k + 1];
  a[0] = primitives::pack<Element>(left[0], left[1]);
  a[1] = primitives::pack<Element>(left[2], left[3]);
  a[2] = primitives::pack<Element>(right[0], right[1]);
  a[3] = primitives::pack<Element>(right[2], right[3]);
}

}  // namespace sink_attention::cuda
