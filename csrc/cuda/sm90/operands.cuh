// wgmma operands (primitives/wgmma.h) that lie in shared-memory tiles (tile/smem_tile.cuh).
//
// The rows of a tile's slabs are the rows of the 128-byte swizzle (64-byte where a slab has 32
// columns). So the tensor cores read a tile as it is, whichever dimension is the product's k:
//
//     Major::kK    k runs along the columns: Q and K in S = Q K^T
//     Major::kMn   k runs along the rows: V in O = P V, a "transposed" operand B
//
// One wgmma step is 16 elements deep in k, 32 for float8. A step's descriptor is the first one plus
// a constant, in units of 16 bytes.
#pragma once

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/wgmma.h"

namespace sink_attention::cuda::sm90 {

using primitives::Major;

// Two adjacent float8 elements of a row, since all tiles have 16-bit elements. A step is 16 pairs
// deep. Major::kK only.
struct Float8Pair {
  uint16_t bits;
};

// The element type of the wgmma instruction for a tile's elements.
template <class Stored>
struct ProductElementOf {
  using Type = Stored;
};
template <>
struct ProductElementOf<Float8Pair> {
  using Type = attention::Float8E4M3;
};
template <class Tile>
using ProductElement = typename ProductElementOf<typename Tile::Element>::Type;

constexpr int kStepDepth = 16;

template <class Tile>
struct Operand {
  using Element = typename Tile::Element;
  static constexpr int kRowBytes = Tile::kSlabCols * 2;
  static constexpr int kSlabBytes = Tile::kRows * kRowBytes;
  static constexpr primitives::Swizzle kSwizzle =
      Tile::kSlabCols == 64 ? primitives::Swizzle::k128 : primitives::Swizzle::k64;

  // Rows from `row` on, a multiple of 8. k: the columns, from 0 on.
  static SA_DEVICE uint64_t k_major(const Tile& tile, int row) {
    return primitives::matrix_descriptor(tile.data + row * Tile::kSlabCols, 16, 8 * kRowBytes,
                                         kSwizzle);
  }
  static SA_DEVICE constexpr int k_major_step(int step) {
    const int col = step * kStepDepth;
    return (col / Tile::kSlabCols * kSlabBytes + col % Tile::kSlabCols * 2) / 16;
  }
  // Columns from `col` on, a multiple of kSlabCols. k: the rows, from `row` on, a multiple of 8.
  static SA_DEVICE uint64_t mn_major(const Tile& tile, int row, int col) {
    return primitives::matrix_descriptor(
        tile.data + (col / Tile::kSlabCols * Tile::kRows + row) * Tile::kSlabCols, kSlabBytes,
        8 * kRowBytes, kSwizzle);
  }
  static SA_DEVICE constexpr int mn_major_step(int step) {
    return step * kStepDepth * kRowBytes / 16;
  }
};

// Each function issues wgmma and returns. The caller fences before, and commits and waits after.

// acc (+)= A B^T:  A rows [a_row, a_row + 64), B rows [b_row, b_row + 8 kTilesN); k: all columns.
template <int kTilesN, class TileA, class TileB>
SA_DEVICE void start_abt(Accumulators<1, kTilesN>& acc, const TileA& a_tile, int a_row,
                         const TileB& b_tile, int b_row, bool accumulate) {
  static_assert(TileA::kCols == TileB::kCols, "k runs along the columns of both");
  const uint64_t a = Operand<TileA>::k_major(a_tile, a_row);
  const uint64_t b = Operand<TileB>::k_major(b_tile, b_row);
  SA_UNROLL
  for (int k = 0; k < TileA::kCols / kStepDepth; ++k) {
    primitives::wgmma_ss<ProductElement<TileA>, Major::kK, Major::kK>(
        acc.c[0], a + Operand<TileA>::k_major_step(k), b + Operand<TileB>::k_major_step(k),
        accumulate || k > 0);
  }
}

// acc (+)= A B^T:  A in registers; B rows [b_row, b_row + 8 kTilesN); k: all columns of B.
template <int kTilesN, int kSteps, class TileB>
SA_DEVICE void start_abt(Accumulators<1, kTilesN>& acc, const uint32_t (&a)[kSteps][4],
                         const TileB& b_tile, int b_row, bool accumulate) {
  static_assert(TileB::kCols == kSteps * kStepDepth, "A is as deep as B has columns");
  const uint64_t b = Operand<TileB>::k_major(b_tile, b_row);
  SA_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    primitives::wgmma_rs<ProductElement<TileB>, Major::kK>(
        acc.c[0], a[k], b + Operand<TileB>::k_major_step(k), accumulate || k > 0);
  }
}

// acc (+)= A B:  A in registers, [64, 16 kSteps]; B rows [b_row, b_row + 16 kSteps), columns
// [b_col, b_col + 8 kTilesN).
template <int kTilesN, int kSteps, class TileB>
SA_DEVICE void start_ab(Accumulators<1, kTilesN>& acc, const uint32_t (&a)[kSteps][4],
                        const TileB& b_tile, int b_row, int b_col, bool accumulate) {
  const uint64_t b = Operand<TileB>::mn_major(b_tile, b_row, b_col);
  SA_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    primitives::wgmma_rs<typename TileB::Element, Major::kMn>(
        acc.c[0], a[k], b + Operand<TileB>::mn_major_step(k), accumulate || k > 0);
  }
}

// acc (+)= A B:  A rows [a_row, a_row + 64) of a tile; B columns [b_col, b_col + 8 kTilesN); k: all
// columns of A, all rows of B.
template <int kTilesN, class TileA, class TileB>
SA_DEVICE void start_ab(Accumulators<1, kTilesN>& acc, const TileA& a_tile, int a_row,
                        const TileB& b_tile, int b_col, bool accumulate) {
  static_assert(TileA::kCols == TileB::kRows, "k runs along A's columns and B's rows");
  const uint64_t a = Operand<TileA>::k_major(a_tile, a_row);
  const uint64_t b = Operand<TileB>::mn_major(b_tile, 0, b_col);
  SA_UNROLL
  for (int k = 0; k < TileA::kCols / kStepDepth; ++k) {
    primitives::wgmma_ss<typename TileA::Element, Major::kK, Major::kMn>(
        acc.c[0], a + Operand<TileA>::k_major_step(k), b + Operand<TileB>::mn_major_step(k),
        accumulate || k > 0);
  }
}

// acc (+)= A^T B:  A columns [a_col, a_col + 64), B columns [b_col, b_col + 8 kTilesN); k: all
// rows.
template <int kTilesN, class TileA, class TileB>
SA_DEVICE void start_atb(Accumulators<1, kTilesN>& acc, const TileA& a_tile, int a_col,
                         const TileB& b_tile, int b_col, bool accumulate) {
  static_assert(TileA::kRows == TileB::kRows, "k runs along the rows of both");
  const uint64_t a = Operand<TileA>::mn_major(a_tile, 0, a_col);
  const uint64_t b = Operand<TileB>::mn_major(b_tile, 0, b_col);
  SA_UNROLL
  for (int k = 0; k < TileA::kRows / kStepDepth; ++k) {
    primitives::wgmma_ss<typename TileA::Element, Major::kMn, Major::kMn>(
        acc.c[0], a + Operand<TileA>::mn_major_step(k), b + Operand<TileB>::mn_major_step(k),
        accumulate || k > 0);
  }
}

// P of a warpgroup as operand A in registers: 16 columns a step.
template <class Element, int kTilesN, int kSteps>
SA_DEVICE void to_operands(const Accumulators<1, kTilesN>& p, uint32_t (&a)[kSteps][4]) {
  static_assert(kTilesN == 2 * kSteps, "all columns");
  SA_UNROLL
  for (int k = 0; k < kSteps; ++k) to_operand_a<Element>(p, 0, k, a[k]);
}

// P of a warpgroup as float8 operand A: 32 columns a step.
//
// With t = lane % 4, a lane's operand register holds k = 4 t ... 4 t + 3. The lane's accumulators
// hold columns 2 t and 2 t + 1 of two tiles. They are used in the order in which they lie, so each
// 16 columns are permuted:
//
//     k = 4 t + i   is column   2 t + i   (i = 0, 1),   8 + 2 t + i - 2   (i = 2, 3)
//
// Operand B must have the same permutation of k.
template <int kTilesN, int kSteps>
SA_DEVICE void to_float8_operands(const Accumulators<1, kTilesN>& p, uint32_t (&a)[kSteps][4]) {
  static_assert(kTilesN == 4 * kSteps, "all columns");
  SA_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    SA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&left)[4] = p.c[0][4 * k + i / 2 * 2];
      const float (&right)[4] = p.c[0][4 * k + i / 2 * 2 + 1];
      const int row = i % 2 * 2;  // the accumulators' upper two are 8 rows below
      a[k][i] = primitives::pack_e4m3(left[row], left[row + 1], right[row], right[row + 1]);
    }
  }
}

}  // namespace sink_attention::cuda::sm90
