// A matrix of 16-bit elements in shared memory, swizzled.
//
// A tile consists of slabs of 64 columns (128 bytes). Slabs of 32 columns are used where the width
// is no multiple of 64, or where a part of the tile must begin at a slab. A chunk is a 16-byte
// vector of 8 elements, the unit of cp.async and ldmatrix. Chunk c of row r is stored at position
//
//     slab of 64:  c ^ (r % 8)            row 0:  0 1 2 3 4 5 6 7
//                                         row 1:  1 0 3 2 5 4 7 6
//                                         row 2:  2 3 0 1 6 7 4 5  ...
//     slab of 32:  c ^ (r / 2 % 4)        (two rows fill the 128 bytes of all banks)
//
// ldmatrix reads one chunk of each of 8 rows at once. Unswizzled, these are 8 addresses in the same
// 4 banks. Swizzled, they lie in 8 different groups of 4 banks, so one pass reads them.
#pragma once

#include "primitives/simt.h"

namespace sink_attention::cuda {

constexpr int kChunkElems = 8;  // of 16 bits: 16 bytes

template <class Element_, int kRows_, int kCols_, int kSlabCols_ = kCols_ % 64 == 0 ? 64 : 32>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kSlabCols = kSlabCols_;
  static constexpr int kSlabChunks = kSlabCols / kChunkElems;
  static constexpr int kChunks = kCols / kChunkElems;  // in a row
  static_assert(sizeof(Element) == 2, "chunks are 8 elements");
  static_assert(kSlabCols == 64 || kSlabCols == 32, "the two swizzles");
  static_assert(kCols % kSlabCols == 0, "whole slabs");
  static_assert(kRows % 8 == 0, "the swizzle repeats after 8 rows");

  alignas(128) Element data[kRows * kCols];

  SA_DEVICE static int offset(int row, int chunk) {
    const int swizzle = kSlabCols == 64 ? row % 8 : row / 2 % 4;
    return (chunk / kSlabChunks * kRows + row) * kSlabCols +
           (chunk % kSlabChunks ^ swizzle) * kChunkElems;
  }
  // The 8 elements (row, 8 * chunk ...).
  SA_DEVICE Element* chunk(int row, int chunk) { return data + offset(row, chunk); }
  SA_DEVICE const Element* chunk(int row, int chunk) const { return data + offset(row, chunk); }
  // One element. For even col, element col + 1 is the next in memory.
  SA_DEVICE Element* at(int row, int col) {
    return chunk(row, col / kChunkElems) + col % kChunkElems;
  }
};

}  // namespace sink_attention::cuda
