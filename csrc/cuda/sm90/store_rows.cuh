// Stores a warp's accumulators to rows of global memory, without shared memory.
//
// Of each accumulator tile of 8 columns, the 4 lanes of a quad hold 2 columns each. Shuffles
// transpose four such tiles within a quad. A lane then holds all 8 columns of one tile: 16 bytes.
// The quad stores 64 contiguous bytes of a row: two whole sectors.
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragment.cuh"
#include "primitives/convert.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

// pairs[n]: this lane's two columns of tile n. Returns all 8 columns of tile lane % 4.
SA_DEVICE primitives::Bytes16 transpose_in_quad(uint32_t (&pairs)[4], int lane) {
  const bool odd = (lane & 1) != 0;
  SA_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = primitives::shfl_xor(odd ? pairs[i] : pairs[i + 1], 1);
    (odd ? pairs[i] : pairs[i + 1]) = received;
  }
  const bool high = (lane & 2) != 0;
  SA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = primitives::shfl_xor(high ? pairs[i] : pairs[i + 2], 2);
    (high ? pairs[i] : pairs[i + 2]) = received;
  }
  return {{pairs[0], pairs[1], pairs[2], pairs[3]}};
}

// Stores the accumulators times scale[half] to row_of(half), which has `cols` elements. A null row
// is skipped. half 0 is row lane / 4 of the warp's 16 rows; half 1 is 8 rows below. Column 0 of the
// accumulators is column first_col of the row.
template <class Element, int kTilesN, class RowOf>
SA_DEVICE void store_rows(const Accumulators<1, kTilesN>& acc, const float (&scale)[2],
                          int first_col, int cols, bool is_vectorised, int lane, RowOf row_of) {
  static_assert(kTilesN % 4 == 0, "four tiles are transposed at a time");
  SA_UNROLL
  for (int half = 0; half < 2; ++half) {
    Element* row = row_of(half);
    SA_UNROLL
    for (int n = 0; n < kTilesN; n += 4) {
      uint32_t pairs[4];
      SA_UNROLL
      for (int i = 0; i < 4; ++i) {
        pairs[i] = primitives::pack<Element>(acc.c[0][n + i][2 * half] * scale[half],
                                             acc.c[0][n + i][2 * half + 1] * scale[half]);
      }
      const primitives::Bytes16 vector = transpose_in_quad(pairs, lane);
      const int col = first_col + 8 * n + 8 * (lane % 4);
      if (row != nullptr && col < cols) store_chunk(row, col, cols, is_vectorised, vector);
    }
  }
}

}  // namespace sink_attention::cuda::sm90
