// A block of keys or values into shared memory, from a tensor or through a block table, of 16 bits
// or, behind a block table, of 8.
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/key_source.cuh"

namespace sink_attention::cuda::sm80 {

// The keys of load_keys from a cache of 8 bits. A thread starts some loads before it waits for the
// first of them.
template <int kThreads, class Tile, bool kValues>
SA_DEVICE void load_8_bit_keys(Tile& tile, const KeySource<kValues>& source, int first_key,
                               bool is_vectorised, int thread) {
  using Element = typename Tile::Element;
  constexpr int kCount = Tile::kRows * Tile::kChunks / kThreads;  // of this thread
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
      const int place = i + j * kThreads;
      const primitives::Bytes16 chunk =
          source.params.kv_dtype == attention::DataType::kInt8
              ? upcast_vector<Element, attention::Int8>(stored[j], scale[j])
              : upcast_vector<Element, attention::Float8E4M3>(stored[j], scale[j]);
      primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(
                                   tile.chunk(place / Tile::kChunks, place % Tile::kChunks)),
                               chunk);
    }
  }
}

// Keys [first_key, first_key + kRows); those that may not be read become zeros. 16-bit rows in
// chunks travel by cp.async, and the caller commits and waits; others are copied at once.
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
          const Element* numbers = source.template row<Element>(first_key + row);
          return numbers == nullptr ? primitives::Bytes16{}
                                    : gather_chunk(numbers, chunk * kChunkElems, cols);
        },
        thread);
  } else if (source.pages == nullptr) {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const bool valid = source.is_readable(key) && col < cols;
          const Element* numbers = source.template origin<Element>();
          if (valid) numbers += key * source.row_stride() + col;
          primitives::cp_async_16(tile.chunk(row, chunk), numbers, valid);
        },
        thread);
  } else {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const Element* numbers = nullptr;
          if (source.is_readable(key) && col < cols) {
            numbers = source.template row_in_page<Element>(key);
          }
          const bool valid = numbers != nullptr;
          primitives::cp_async_16(tile.chunk(row, chunk),
                                  valid ? numbers + col : source.template origin<Element>(), valid);
        },
        thread);
  }
}

}  // namespace sink_attention::cuda::sm80
