// A warp's matrix products on tiles in shared memory.
//
// `lane` is lane_idx() or rematerialise_lane_idx(). Addresses depend on nothing else of a thread,
// so the second makes the compiler recompute them at each product, which saves registers.
//
// Both operands of a step (16 along k) are loaded by ldmatrix. For operand B one ldmatrix.x4 loads
// two fragments of 8 columns, so the number of accumulator columns is a multiple of 16.
#pragma once

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/ldmatrix.h"
#include "primitives/mma.h"

namespace sink_attention::cuda {

// Operand A: rows [row, row + 16), columns [16 k, 16 k + 16) of a tile. Lanes 0 to 15 give the row
// addresses of the left half, lanes 16 to 31 those of the right half.
template <class Tile>
SA_DEVICE void load_operand_a(const Tile& tile, int row, int k, uint32_t (&a)[4],
                              int lane = primitives::lane_idx()) {
  primitives::ldmatrix_x4(a, tile.chunk(row + lane % 16, 2 * k + lane / 16));
}

// Operand A from a tile that holds A transposed: A(m, k) = tile(row + k, col + m), 16 x 16.
template <class Tile>
SA_DEVICE void load_operand_a_trans(const Tile& tile, int row, int col, uint32_t (&a)[4],
                                    int lane = primitives::lane_idx()) {
  // The four 8 x 8 matrices in the order of a[]: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8).
  primitives::ldmatrix_x4_trans(
      a, tile.chunk(row + lane % 8 + lane / 16 * 8, col / kChunkElems + lane / 8 % 2));
}

// Two operands B from a tile whose rows are B's columns (K in Q K^T): columns n in
// [row, row + 16), k in [16 k, 16 k + 16).
template <class Tile>
SA_DEVICE void load_operand_b(const Tile& tile, int row, int k, uint32_t (&b0)[2],
                              uint32_t (&b1)[2], int lane = primitives::lane_idx()) {
  uint32_t r[4];
  primitives::ldmatrix_x4(r, tile.chunk(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  b0[0] = r[0];
  b0[1] = r[1];
  b1[0] = r[2];
  b1[1] = r[3];
}

// Two operands B from a tile whose rows are B's rows (V in P V): k in [row, row + 16), columns n in
// [col, col + 16).
template <class Tile>
SA_DEVICE void load_operand_b_trans(const Tile& tile, int row, int col, uint32_t (&b0)[2],
                                    uint32_t (&b1)[2], int lane = primitives::lane_idx()) {
  uint32_t r[4];
  primitives::ldmatrix_x4_trans(r, tile.chunk(row + lane % 16, col / kChunkElems + lane / 16));
  b0[0] = r[0];
  b0[1] = r[1];
  b1[0] = r[2];
  b1[1] = r[3];
}

// acc += A B^T with A rows [a_row, a_row + 16 kTilesM) and B rows [b_row, b_row + 8 kTilesN). The
// sum runs over all columns of both.
template <int kTilesM, int kTilesN, class TileA, class TileB>
SA_DEVICE void gemm_abt(Accumulators<kTilesM, kTilesN>& acc, const TileA& a_tile, int a_row,
                        const TileB& b_tile, int b_row, int lane = primitives::lane_idx()) {
  static_assert(TileA::kCols == TileB::kCols, "summed over the columns of both");
  static_assert(kTilesN % 2 == 0, "operand B comes in pairs of tiles");
  SA_UNROLL
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    uint32_t a[kTilesM][4];
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) load_operand_a(a_tile, a_row + 16 * m, k, a[m], lane);
    SA_UNROLL
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b0[2];
      uint32_t b1[2];
      load_operand_b(b_tile, b_row + 8 * n, k, b0, b1, lane);
      SA_UNROLL
      for (int m = 0; m < kTilesM; ++m) {
        primitives::mma_m16n8k16<typename TileA::Element>(acc.c[m][n], a[m], b0);
        primitives::mma_m16n8k16<typename TileA::Element>(acc.c[m][n + 1], a[m], b1);
      }
    }
  }
}

// acc += P B with P in registers, the accumulators of an earlier product, and B rows
// [b_row, b_row + 8 kTilesK), all columns, in shared memory.
template <int kTilesM, int kTilesK, int kTilesN, class TileB>
SA_DEVICE void gemm_rs(Accumulators<kTilesM, kTilesN>& acc, const Accumulators<kTilesM, kTilesK>& p,
                       const TileB& b_tile, int b_row, int lane = primitives::lane_idx()) {
  static_assert(TileB::kCols == 8 * kTilesN, "all columns");
  static_assert(kTilesN % 2 == 0 && kTilesK % 2 == 0, "operands come in pairs of tiles");
  SA_UNROLL
  for (int k = 0; k < kTilesK / 2; ++k) {
    uint32_t a[kTilesM][4];
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) to_operand_a<typename TileB::Element>(p, m, k, a[m]);
    SA_UNROLL
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b0[2];
      uint32_t b1[2];
      load_operand_b_trans(b_tile, b_row + 16 * k, 8 * n, b0, b1, lane);
      SA_UNROLL
      for (int m = 0; m < kTilesM; ++m) {
        primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n], a[m], b0);
        primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n + 1], a[m], b1);
      }
    }
  }
}

}  // namespace sink_attention::cuda
