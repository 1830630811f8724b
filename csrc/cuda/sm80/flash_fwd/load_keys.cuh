// A block of keys or values into shared memory, from a tensor or through a block table, of 16 bits
// or, behind a block table, of 8.
#pragma once

#include <cstring>

#include "attention/paged_kv.h"
#include "cuda/tile/copy.cuh"
#include "primitives/convert.h"

namespace sink_attention::cuda::sm80 {

// Eight 8-bit numbers of a row; zeros beyond cols.
SA_DEVICE uint64_t load_8_bit_chunk(const uint8_t* row, int first, int cols, bool in_chunks) {
  uint64_t chunk = 0;
  if (in_chunks) {
    if (first < cols) {
      chunk = primitives::load_global(reinterpret_cast<const uint64_t*>(row + first));
    }
    return chunk;
  }
  SA_UNROLL
  for (int i = 0; i < kChunkElems; ++i) {
    if (first + i < cols) chunk |= uint64_t{primitives::load_global(row + first + i)} << (8 * i);
  }
  return chunk;
}

SA_DEVICE float widen(attention::Int8 number) { return attention::to_float(number); }

// float8 bits at a float's place stand for 2^-120 of the number; so do subnormals, with which a GPU
// computes as it does with others.
SA_DEVICE float widen(attention::Float8E4M3 number) {
  const uint32_t extended = static_cast<uint32_t>(static_cast<int8_t>(number.bits));
  const float value = attention::float_of((extended << 20) & 0x87f00000u) * 0x1p120f;
  return (number.bits & 0x7fu) == 0x7fu ? attention::float_of(0x7fc00000u) : value;
}

// Eight stored numbers times their scale, rounded to Element; where the scale is 1 nothing is lost.
template <class Element, class Stored>
SA_DEVICE primitives::Bytes16 widen_chunk(uint64_t stored, float scale) {
  primitives::Bytes16 chunk;
  Stored numbers[kChunkElems];
  memcpy(numbers, &stored, sizeof(numbers));
  SA_UNROLL
  for (int i = 0; i < kChunkElems; i += 2) {
    chunk.word[i / 2] =
        primitives::pack<Element>(widen(numbers[i]) * scale, widen(numbers[i + 1]) * scale);
  }
  return chunk;
}

// The keys (or values) of one sequence and kv head. Kept small, since it lives in registers as long
// as the kernel runs: strides and sizes are read from the problem, which lies in constant memory,
// anew.
template <bool kValues>
struct KeySource {
  const attention::FlashFwdProblem& problem;
  const char* base;      // of key 0, or of page 0 slot 0 with a block table
  const int32_t* pages;  // the sequence's row of the block table, or null
  const float* scales;   // of page 0 slot 0 where each token has its own, or null
  int sink_end;          // keys that may be read: [0, sink_end) and [begin, end); the others count
  int begin;             // as zeros
  int end;

  SA_DEVICE int dim() const {
    return static_cast<int>(kValues ? problem.head_dim_v : problem.head_dim);
  }
  SA_DEVICE int64_t row_stride() const {
    return kValues ? problem.v_stride_row : problem.k_stride_row;
  }
  SA_DEVICE int64_t page_stride() const {
    return kValues ? problem.v_stride_batch : problem.k_stride_batch;
  }
  SA_DEVICE int64_t scale_stride_page() const {
    return kValues ? problem.v_scale_stride_page : problem.k_scale_stride_page;
  }
  SA_DEVICE int64_t scale_stride_slot() const {
    return kValues ? problem.v_scale_stride_slot : problem.k_scale_stride_slot;
  }
  SA_DEVICE bool is_readable(int key) const {
    return key < sink_end || (begin <= key && key < end);
  }

  template <class Stored>
  SA_DEVICE const Stored* origin() const {
    return reinterpret_cast<const Stored*>(base);
  }
  template <class Stored>
  SA_DEVICE const Stored* row_in_page(int key) const {
    const int page_size = static_cast<int>(problem.page_size);
    const int page = key / page_size;
    return origin<Stored>() + primitives::load_global(pages + page) * page_stride() +
           (key - page * page_size) * row_stride();
  }
  template <class Stored>
  SA_DEVICE const Stored* row(int key) const {
    if (!is_readable(key)) return nullptr;
    return pages == nullptr ? origin<Stored>() + key * row_stride() : row_in_page<Stored>(key);
  }
};

// What a kv head's stored numbers are to be multiplied with; 1 but for 8 bits with one scale for
// all of its tokens, which scores and results are multiplied with instead.
SA_DEVICE float cache_scale(const float* scales, const attention::FlashFwdProblem& problem,
                            int kv_head) {
  return scales == nullptr ? 1.0f
                           : primitives::load_global(scales + kv_head * problem.kv_scale_stride);
}

template <bool kValues>
SA_DEVICE KeySource<kValues> key_source(const attention::FlashFwdProblem& problem, int batch_idx,
                                        int kv_head, const attention::SeqlenInfo& info,
                                        attention::KeySet visible) {
  const attention::KeyRows rows =
      kValues ? attention::value_rows(problem, batch_idx, info, kv_head, visible)
              : attention::key_rows(problem, batch_idx, info, kv_head, visible);
  return {problem,
          rows.base,
          rows.pages,
          rows.token_scales,
          static_cast<int>(rows.readable.sink_end),
          static_cast<int>(rows.readable.window.begin),
          static_cast<int>(rows.readable.window.end)};
}

// The keys of load_keys from a cache of 8 bits. A thread starts some loads before it waits for the
// first of them.
template <int kThreads, class Tile, bool kValues>
SA_DEVICE void load_8_bit_keys(Tile& tile, const KeySource<kValues>& source, int first_key,
                               bool in_chunks, int thread) {
  using Element = typename Tile::Element;
  constexpr int kCount = Tile::kRows * Tile::kChunks / kThreads;  // of this thread
  constexpr int kTogether = kCount % 4 == 0 ? 4 : 2;
  static_assert(kCount * kThreads == Tile::kRows * Tile::kChunks && kCount % kTogether == 0);
  const int cols = source.dim();
  const int page_size = static_cast<int>(source.problem.page_size);
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
      const int slot = key % page_size;
      stored[j] = load_8_bit_chunk(source.template origin<uint8_t>() + page * source.page_stride() +
                                       slot * source.row_stride(),
                                   chunk * kChunkElems, cols, in_chunks);
      if (source.scales != nullptr) {
        scale[j] = primitives::load_global(source.scales + page * source.scale_stride_page() +
                                           slot * source.scale_stride_slot());
      }
    }
    SA_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const int place = i + j * kThreads;
      const primitives::Bytes16 chunk =
          source.problem.kv_dtype == attention::DataType::kInt8
              ? widen_chunk<Element, attention::Int8>(stored[j], scale[j])
              : widen_chunk<Element, attention::Float8E4M3>(stored[j], scale[j]);
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
                         bool in_chunks) {
  using Element = typename Tile::Element;
  const int cols = source.dim();
  const int thread = primitives::opaque(primitives::thread_idx());
  if (attention::is_8_bit(source.problem.kv_dtype)) {
    load_8_bit_keys<kThreads>(tile, source, first_key, in_chunks, thread);
  } else if (!in_chunks) {
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
          const bool valid = source.is_readable(key) && col < cols;
          const Element* numbers = source.template origin<Element>();
          if (valid) numbers = source.template row_in_page<Element>(key) + col;
          primitives::cp_async_16(tile.chunk(row, chunk), numbers, valid);
        },
        thread);
  }
}

}  // namespace sink_attention::cuda::sm80
