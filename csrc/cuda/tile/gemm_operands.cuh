// More products of a warp (gemm.cuh), with operand A in registers or in a transposed tile.
#pragma once

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// Operand A of 16 kTilesM x 16 kTilesK elements, in registers.
template <int kTilesM, int kTilesK>
struct OperandsA {
  uint32_t a[kTilesM][kTilesK][4];

  // The word that holds c[2 half] and c[2 half + 1] of accumulator (m, n) (fragment.cuh).
  SA_DEVICE uint32_t& pair(int m, int n, int half) { return a[m][n / 2][n % 2 * 2 + half]; }
};

// Loads rows [row, row + 16 kTilesM) of a tile, all columns.
template <int kTilesM, int kTilesK, class Tile>
SA_DEVICE void load_operands_a(OperandsA<kTilesM, kTilesK>& operands, const Tile& tile, int row,
                               int lane) {
  static_assert(Tile::kCols == 16 * kTilesK, "all columns");
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int k = 0; k < kTilesK; ++k) load_operand_a(tile, row + 16 * m, k, operands.a[m][k], lane);
  }
}

// Stores A in rows [row, row + 16 kTilesM), columns [col, col + 16 kTilesK) of a tile.
template <int kTilesM, int kTilesK, class Tile>
SA_DEVICE void store_operands_a(OperandsA<kTilesM, kTilesK>& operands, Tile& tile, int row, int col,
                                int lane) {
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int n = 0; n < 2 * kTilesK; ++n) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        auto* target = tile.at(row + 16 * m + accumulator_row(lane, 2 * half),
                               col + 8 * n + accumulator_col(lane, 0));
        primitives::store_shared(reinterpret_cast<uint32_t*>(target), operands.pair(m, n, half));
      }
    }
  }
}

// acc += A B^T with B rows [b_row, b_row + 8 kTilesN). The sum runs over all columns.
template <int kTilesM, int kTilesN, int kTilesK, class TileB>
SA_DEVICE void gemm_abt(Accumulators<kTilesM, kTilesN>& acc,
                        const OperandsA<kTilesM, kTilesK>& operands, const TileB& b_tile, int b_row,
                        int lane) {
  static_assert(TileB::kCols == 16 * kTilesK, "summed over all columns");
  SA_UNROLL
  for (int k = 0; k < kTilesK; ++k) {
    SA_UNROLL
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b0[2];
      uint32_t b1[2];
      load_operand_b(b_tile, b_row + 8 * n, k, b0, b1, lane);
      SA_UNROLL
      for (int m = 0; m < kTilesM; ++m) {
        primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n], operands.a[m][k], b0);
        primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n + 1], operands.a[m][k], b1);
      }
    }
  }
}

// One step of acc += A B, 16 along k: B rows [b_row, b_row + 16), columns
// [b_col, b_col + 8 kTilesN).
template <int kTilesM, int kTilesN, class TileB>
SA_DEVICE void multiply_step(Accumulators<kTilesM, kTilesN>& acc, const uint32_t (&a)[kTilesM][4],
                             const TileB& b_tile, int b_row, int b_col, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; n += 2) {
    uint32_t b0[2];
    uint32_t b1[2];
    load_operand_b_trans(b_tile, b_row, b_col + 8 * n, b0, b1, lane);
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n], a[m], b0);
      primitives::mma_m16n8k16<typename TileB::Element>(acc.c[m][n + 1], a[m], b1);
    }
  }
}

// acc += A B with A in registers, and all rows of B, columns [b_col, b_col + 8 kTilesN).
template <int kTilesM, int kTilesN, int kTilesK, class TileB>
SA_DEVICE void gemm_ab(Accumulators<kTilesM, kTilesN>& acc,
                       const OperandsA<kTilesM, kTilesK>& operands, const TileB& b_tile, int b_col,
                       int lane) {
  static_assert(TileB::kRows == 16 * kTilesK, "summed over all rows");
  SA_UNROLL
  for (int k = 0; k < kTilesK; ++k) {
    uint32_t a[kTilesM][4];
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int i = 0; i < 4; ++i) a[m][i] = operands.a[m][k][i];
    }
    multiply_step(acc, a, b_tile, 16 * k, b_col, lane);
  }
}

// acc += A B with A rows [a_row, a_row + 16 kTilesM) of a tile.
template <int kTilesM, int kTilesN, class TileA, class TileB>
SA_DEVICE void gemm_ab(Accumulators<kTilesM, kTilesN>& acc, const TileA& a_tile, int a_row,
                       const TileB& b_tile, int b_col, int lane) {
  static_assert(TileA::kCols == TileB::kRows, "summed over");
  SA_UNROLL
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    uint32_t a[kTilesM][4];
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) load_operand_a(a_tile, a_row + 16 * m, k, a[m], lane);
    multiply_step(acc, a, b_tile, 16 * k, b_col, lane);
  }
}

// acc += A^T B with A columns [a_col, a_col + 16 kTilesM) of a tile.
template <int kTilesM, int kTilesN, class TileA, class TileB>
SA_DEVICE void gemm_atb(Accumulators<kTilesM, kTilesN>& acc, const TileA& a_tile, int a_col,
                        const TileB& b_tile, int b_col, int lane) {
  static_assert(TileA::kRows == TileB::kRows, "summed over");
  SA_UNROLL
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    uint32_t a[kTilesM][4];
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m)
      load_operand_a_trans(a_tile, 16 * k, a_col + 16 * m, a[m], lane);
    multiply_step(acc, a, b_tile, 16 * k, b_col, lane);
  }
}

}  // namespace sink_attention::cuda
