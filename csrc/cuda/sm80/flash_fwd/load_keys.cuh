// A block of keys or values into shared memory, from a tensor or through a block table, 16-bit or
// float8.
#pragma once

#include "attention/paged_kv.h"
#include "cuda/tile/copy.cuh"
#include "primitives/convert.h"

namespace sink_attention::cuda::sm80 {

// Eight float8 numbers as Elements, which hold each of them exactly; the scale is applied
// elsewhere.
template <class Element>
SA_DEVICE primitives::Bytes16 widen_chunk(const attention::Float8E4M3* row, int first, int cols) {
  primitives::Bytes16 chunk{};
  SA_UNROLL
  for (int i = 0; i < kChunkElems; i += 2) {
    float pair[2] = {};
    SA_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (first + i + j < cols) {
        pair[j] = attention::to_float(primitives::load_global(row + first + i + j));
      }
    }
    chunk.word[i / 2] = primitives::pack<Element>(pair[0], pair[1]);
  }
  return chunk;
}

// Rows [first_key, first_key + kRows) of `rows`; those that may not be read become zeros. 16-bit
// rows in chunks travel by cp.async; the caller commits and waits.
template <int kThreads, class Tile>
SA_DEVICE void load_keys(Tile& tile, const attention::KeyRows& rows, int first_key,
                         bool in_chunks) {
  using Element = typename Tile::Element;
  const int cols = static_cast<int>(rows.dim);
  if (rows.dtype == attention::DataType::kFloat8E4M3) {
    for (int i = primitives::thread_idx(); i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int row = i / Tile::kChunks;
      const int chunk = i % Tile::kChunks;
      primitives::Bytes16 numbers{};
      if (rows.is_readable(first_key + row)) {
        const auto* source = static_cast<const attention::Float8E4M3*>(rows.row(first_key + row));
        numbers = widen_chunk<Element>(source, chunk * kChunkElems, cols);
      }
      primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(tile.chunk(row, chunk)),
                               numbers);
    }
    return;
  }
  load_tile<kThreads>(tile, cols, in_chunks, [&](int row) {
    return rows.is_readable(first_key + row)
               ? static_cast<const Element*>(rows.row(first_key + row))
               : nullptr;
  });
}

}  // namespace sink_attention::cuda::sm80
