// Rows of keys or values in shared memory as they are stored, of 16 or of 8 bits a number,
// swizzled.
//
// A row's 16-byte chunks lie in slabs of 128 bytes a row, or of 64 or 32 where that is what divides
// the row, permuted as a copy engine's box of that width is (primitives/tma.h), so that a slab is
// made of boxes. The 8 rows that ldmatrix reads at one chunk lie in different banks. A row of
// 16-bit numbers lies as SmemTile has it.
#pragma once

#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda {

constexpr int kChunkBytes = 16;

template <int kRows_, int kRowBytes_>
struct StoredTile {
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kSlabBytes = kRowBytes % 128 == 0 ? 128 : kRowBytes % 64 == 0 ? 64 : 32;
  static constexpr int kSlabs = kRowBytes / kSlabBytes;
  static constexpr int kChunks = kRowBytes / kChunkBytes;  // of a row
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % kSlabBytes == 0, "whole slabs");
  static_assert(kRows % 8 == 0, "the swizzle repeats after 8 rows");

  alignas(128) char data[kBytes];

  SA_DEVICE static int offset(int row, int chunk) {
    constexpr int kSlabChunks = kSlabBytes / kChunkBytes;
    const int swizzle = row * kSlabBytes / 128 % kSlabChunks;
    return (chunk / kSlabChunks * kRows + row) * kSlabBytes +
           (chunk % kSlabChunks ^ swizzle) * kChunkBytes;
  }
  SA_DEVICE char* chunk(int row, int chunk) { return data + offset(row, chunk); }
  SA_DEVICE const char* chunk(int row, int chunk) const { return data + offset(row, chunk); }
};

}  // namespace sink_attention::cuda
