// Copies of rows between global memory and a tile in shared memory.
//
// The unit is a chunk: a 16-byte vector of 8 elements. Thread t copies chunks t, t + kThreads, ...
// in row-major order, so that neighbouring threads access neighbouring vectors. Loads fill with
// zeros: columns from `cols` on, and rows for which row_of returns null.
#pragma once

#include "attention/numeric.h"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/cp_async.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// Whether every row may be accessed in 16-byte vectors: base and strides are multiples of 16 bytes,
// and cols is a multiple of 8.
SA_HOST_DEVICE bool rows_are_vectorised(const void* base, int64_t cols, int64_t stride_a,
                                        int64_t stride_b, int64_t stride_c) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         (cols | stride_a | stride_b | stride_c) % kChunkElems == 0;
}

// Elements [first, first + 8) of a row of any alignment; zeros from cols on.
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

// Calls visit(row, chunk) for each chunk of a tile that this thread copies. Where kThreads covers
// whole rows, a thread keeps its column and its rows are a multiple of 8 apart. Then its swizzled
// addresses differ by constants.
template <int kThreads, class Tile, class Visit>
SA_DEVICE void for_each_chunk(Visit visit, unsigned thread) {
  constexpr unsigned kCount = Tile::kRows * Tile::kChunks;
  if constexpr (kThreads % Tile::kChunks == 0 && kCount % kThreads == 0) {
    const int chunk = thread % Tile::kChunks;
    const int first_row = thread / Tile::kChunks;
    SA_UNROLL
    for (int row = 0; row < Tile::kRows; row += kThreads / Tile::kChunks) {
      visit(first_row + row, chunk);
    }
  } else {
    for (unsigned i = thread; i < kCount; i += kThreads) {
      visit(static_cast<int>(i / Tile::kChunks), static_cast<int>(i % Tile::kChunks));
    }
  }
}

// Fills a tile with make(row, chunk), 16 bytes each.
template <int kThreads, class Tile, class Make>
SA_DEVICE void store_chunks(Tile& tile, Make make, int thread) {
  for (int i = thread; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks;
    const int chunk = i % Tile::kChunks;
    primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(tile.chunk(row, chunk)),
                             make(row, chunk));
  }
}

// Starts the copy of all rows of a tile by cp.async; the caller commits and waits. row_of(r) is the
// address of row r, or null. If is_vectorised is false, the rows are copied synchronously, element
// by element.
template <int kThreads, class Tile, class RowOf>
SA_DEVICE void load_tile(Tile& tile, int cols, bool is_vectorised, RowOf row_of,
                         int thread = primitives::thread_idx()) {
  using Element = typename Tile::Element;
  if (is_vectorised) {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const Element* source = row_of(row);
          const bool valid = source != nullptr && chunk * kChunkElems < cols;
          primitives::cp_async_16(tile.chunk(row, chunk),
                                  valid ? source + chunk * kChunkElems : source, valid);
        },
        thread);
  } else {
    store_chunks<kThreads>(
        tile,
        [&](int row, int chunk) {
          const Element* source = row_of(row);
          return source == nullptr ? primitives::Bytes16{}
                                   : gather_chunk(source, chunk * kChunkElems, cols);
        },
        thread);
  }
}

// Writes elements [first, first + 8) of a row; those from cols on are left out.
template <class Element>
SA_DEVICE void store_chunk(Element* row, int first, int cols, bool is_vectorised,
                           const primitives::Bytes16& chunk) {
  if (is_vectorised) {
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

// Writes the rows of a tile to global memory. row_of(r) is the address of row r, or null to skip
// it.
template <int kThreads, class Tile, class RowOf>
SA_DEVICE void store_tile(const Tile& tile, int cols, bool is_vectorised, RowOf row_of,
                          int thread = primitives::thread_idx()) {
  using Element = typename Tile::Element;
  for_each_chunk<kThreads, Tile>(
      [&](int row, int chunk_idx) {
        Element* target = row_of(row);
        if (target == nullptr || chunk_idx * kChunkElems >= cols) return;
        const primitives::Bytes16 chunk = primitives::load_shared(
            reinterpret_cast<const primitives::Bytes16*>(tile.chunk(row, chunk_idx)));
        store_chunk(target, chunk_idx * kChunkElems, cols, is_vectorised, chunk);
      },
      thread);
}

}  // namespace sink_attention::cuda
