// Loads a block of keys or values into shared memory, from a contiguous tensor (16-bit) or through
// a block table (16-bit or 8-bit).
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/key_source.cuh"

namespace sink_attention::cuda::sm80 {

// load_keys for an 8-bit cache. A thread issues kTogether loads before it uses the first of them.
template <int kThreads, class Tile, bool kValues>
SA_DEVICE void load_8_bit_keys(Tile& tile, const KeySource<kValues>& source, int first_key,
                               bool is_vectorised, int thread) {
  using Element = typename Tile::Element;
  constexpr int kCount = Tile::kRows * Tile::kChunks / kThreads;  // 16-byte vectors per thread
  constexpr int kTogether = kCount % 4 == 0 ? 4 : 2;
  static_assert(kCount * kThreads == Tile::kRows * Tile::kChunks && kCount % kTogether == 0);
  const int cols = source.dim();
  const int page_size = static_cast<int>(source.params.page_size);
  for (int i = thread; i < kCount * kThreads; i += kTogether * kThreads) {
    uint64_t stored[kTogether];
    float scale[kTogether];
    SA_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const int key = first_key + (i + j * kThreads) / Tile::kChunks;
      const int chunk = (i + j * kThreads) % Tile::kChunks;
      stored[j] = 0;
      scale[j] = 1.0f;
      if (!source.is_readable(key)) continue;
      const int64_t page = primitives::load_global(source.pages + key / page_size);
      if (!source.has_page(static_cast<int>(page))) continue;
      const int slot = key % page_size;
      stored[j] = load_8_bit_chunk(source.template origin<uint8_t>() + page * source.page_stride() +
                                       slot * source.row_stride(),
                                   chunk * kChunkElems, cols, is_vectorised);
      if (source.scales != nullptr) {
        scale[j] = primitives::load_global(source.scales + page * source.scale_stride_page() +
                                           slot * source.scale_stride_slot());
      }
    }
    SA_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const int idx = i + j * kThreads;
      const primitives::Bytes16 chunk =
          source.params.kv_dtype == attention::DataType::kInt8
              ? upcast_vector<Element, attention::Int8>(stored[j], scale[j])
              : upcast_vector<Element, attention::Float8E4M3>(stored[j], scale[j]);
      primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(
                                   tile.chunk(idx / Tile::kChunks, idx % Tile::kChunks)),
                               chunk);
    }
  }
}

// Loads keys [first_key, first_key + kRows), with zeros for keys that may not be read. Vectorised
// 16-bit rows are copied by cp.async; the caller commits and waits. Others are copied
// synchronously.
template <int kThreads, class Tile, bool kValues>
SA_DEVICE void load_keys(Tile& tile, const KeySource<kValues>& source, int first_key,
                         bool is_vectorised) {
  using Element = typename Tile::Element;
  const int cols = source.dim();
  const int thread = primitives::optimisation_barrier(primitives::thread_idx());
  if (attention::is_8_bit(source.params.kv_dtype)) {
    load_8_bit_keys<kThreads>(tile, source, first_key, is_vectorised, thread);
  } else if (!is_vectorised) {
    store_chunks<kThreads>(
        tile,
        [&](int row, int chunk) {
          const Element* source_row = source.template row<Element>(first_key + row);
          return source_row == nullptr ? primitives::Bytes16{}
                                       : gather_chunk(source_row, chunk * kChunkElems, cols);
        },
        thread);
  } else if (source.pages == nullptr) {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const bool valid = source.is_readable(key) && col < cols;
          const Element* source_row = source.template origin<Element>();
          if (valid) source_row += key * source.row_stride() + col;
          primitives::cp_async_16(tile.chunk(row, chunk), source_row, valid);
        },
        thread);
  } else {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const Element* source_row = nullptr;
          if (source.is_readable(key) && col < cols) {
            source_row = source.template row_in_page<Element>(key);
          }
          const bool valid = source_row != nullptr;
          primitives::cp_async_16(tile.chunk(row, chunk),
                                  valid ? source_row + col : source.template origin<Element>(),
                                  valid);
        },
        thread);
  }
}

}  // namespace sink_attention::cuda::sm80
