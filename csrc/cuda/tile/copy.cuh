// Rows between global memory and a tile in shared memory.
//
// A block copies a tile chunk by chunk: thread t takes chunks t, t + kThreads, ... in row-major
// order, so that neighbouring threads read neighbouring 16 bytes. Columns beyond the row's `cols`
// numbers, and rows that are not there (row_of gives null), become zeros.
#pragma once

#include "attention/numeric.h"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/cp_async.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// Whether every row may be read and written 16 bytes at a time: addresses and strides are multiples
// of 16 bytes, and cols of 8 numbers.
SA_HOST_DEVICE bool rows_are_chunks(const void* base, int64_t cols, int64_t stride_a,
                                    int64_t stride_b, int64_t stride_c) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         (cols | stride_a | stride_b | stride_c) % kChunkElems == 0;
}

// Eight numbers of a row, whatever its alignment; zeros beyond cols.
template <class Element>
SA_DEVICE primitives::Bytes16 gather_chunk(const Element* row, int first, int cols) {
  primitives::Bytes16 chunk{};
  SA_UNROLL
  for (int i = 0; i < kChunkElems; ++i) {
    if (first + i < cols) {
      chunk.word[i / 2] |= uint32_t{primitives::load_global(row + first + i).bits}
                           << (16 * (i % 2));
    }
  }
  return chunk;
}

// Starts the copy of all rows of a tile; the caller commits and waits. row_of(r): where row r lies,
// or null. Where in_chunks is false the rows are copied at once, number by number.
template <int kThreads, class Tile, class RowOf>
SA_DEVICE void load_tile(Tile& tile, int cols, bool in_chunks, RowOf row_of,
                         int thread = primitives::thread_idx()) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kRows * Tile::kChunks;
  SA_UNROLL
  for (int begin = 0; begin < kChunks; begin += kThreads) {
    const int i = begin + thread;
    if (kChunks % kThreads != 0 && i >= kChunks) break;
    const int row = i / Tile::kChunks;
    const int chunk = i % Tile::kChunks;
    const int first = chunk * kChunkElems;
    const Element* source = row_of(row);
    const bool valid = source != nullptr && first < cols;
    Element* target = tile.chunk(row, chunk);
    if (in_chunks) {
      primitives::cp_async_16(target, source + (valid ? first : 0), valid);
    } else {
      primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(target),
                               valid ? gather_chunk(source, first, cols) : primitives::Bytes16{});
    }
  }
}

// Writes the numbers first ... first + 7 of a row, those below cols.
template <class Element>
SA_DEVICE void store_chunk(Element* row, int first, int cols, bool in_chunks,
                           const primitives::Bytes16& chunk) {
  if (in_chunks) {
    primitives::store_global(reinterpret_cast<primitives::Bytes16*>(row + first), chunk);
    return;
  }
  SA_UNROLL
  for (int i = 0; i < kChunkElems; ++i) {
    if (first + i < cols) {
      const uint16_t bits = static_cast<uint16_t>(chunk.word[i / 2] >> (16 * (i % 2)));
      primitives::store_global(row + first + i, Element{bits});
    }
  }
}

// Writes rows of a tile out. row_of(r): where row r goes, or null.
template <int kThreads, class Tile, class RowOf>
SA_DEVICE void store_tile(const Tile& tile, int cols, bool in_chunks, RowOf row_of,
                          int thread = primitives::thread_idx()) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kRows * Tile::kChunks;
  SA_UNROLL
  for (int begin = 0; begin < kChunks; begin += kThreads) {
    const int i = begin + thread;
    if (kChunks % kThreads != 0 && i >= kChunks) break;
    const int row = i / Tile::kChunks;
    const int first = i % Tile::kChunks * kChunkElems;
    Element* target = row_of(row);
    if (target == nullptr || first >= cols) continue;
    const primitives::Bytes16 chunk = primitives::load_shared(
        reinterpret_cast<const primitives::Bytes16*>(tile.chunk(row, i % Tile::kChunks)));
    store_chunk(target, first, cols, in_chunks, chunk);
  }
}

}  // namespace sink_attention::cuda
