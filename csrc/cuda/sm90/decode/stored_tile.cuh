// A tile of keys or values in shared memory as they are stored, 16 or 8 bits an element, swizzled.
//
// A row's 16-byte vectors lie in slabs of 128 bytes a row, or of 64 or 32 where only that divides
// the row. They are permuted as in a TMA box of that width (primitives/tma.h), so TMA writes whole
// slabs. The 8 rows that ldmatrix reads at one vector lie in different banks. A row of 16-bit
// elements lies as in SmemTile.
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
