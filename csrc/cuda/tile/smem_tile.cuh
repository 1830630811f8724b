// A matrix of 16-bit elements in shared memory, swizzled.
//
// Rows lie in slabs of 64 columns (128 bytes), or of 32 where the width is no multiple of 64, or
// where a part that begins at a slab shall. A row is made of 16-byte chunks, the grain of cp.async
// and of ldmatrix, and chunk c of row r lies where
//
//     slab of 64:  chunk c ^ (r % 8)            row 0:  0 1 2 3 4 5 6 7
//                                               row 1:  1 0 3 2 5 4 7 6
//                                               row 2:  2 3 0 1 6 7 4 5  ...
//     slab of 32:  chunk c ^ (r / 2 % 4)        (two rows fill the 128 bytes of all banks)
//
// would. ldmatrix reads one chunk column of 8 rows at once: unswizzled, 8 addresses 128 bytes apart
// in the same 4 banks; like this they lie in 8 different groups of 4 banks, so it takes one pass.
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
  static constexpr int kChunks = kCols / kChunkElems;  // of a row
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
  // One element; its neighbour to the right follows it where col is even.
  SA_DEVICE Element* at(int row, int col) {
    return chunk(row, col / kChunkElems) + col % kChunkElems;
  }
};

}  // namespace sink_attention::cuda
