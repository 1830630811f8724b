// The keys or values of a sequence, wherever they lie, and 8-bit numbers of a cache made 16-bit
// ones.
#pragma once

#include <cstring>

#include "attention/paged_kv.h"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/convert.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// Eight 8-bit numbers of a row; zeros beyond cols.
SA_DEVICE uint64_t load_8_bit_chunk(const uint8_t* row, int first, int cols, bool is_vectorised) {
  uint64_t chunk = 0;
  if (is_vectorised) {
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

SA_DEVICE float upcast(attention::Int8 number) { return attention::to_float(number); }

// float8 bits at a float's place stand for 2^-120 of the number; so do subnormals, with which a GPU
// computes as it does with others.
SA_DEVICE float upcast(attention::Float8E4M3 number) {
  const uint32_t extended = static_cast<uint32_t>(static_cast<int8_t>(number.bits));
  const float value = attention::float_of((extended << 20) & 0x87f00000u) * 0x1p120f;
  return (number.bits & 0x7fu) == 0x7fu ? attention::float_of(0x7fc00000u) : value;
}

// Eight stored numbers times their scale, rounded to Element; where the scale is 1 nothing is lost.
template <class Element, class Stored>
SA_DEVICE primitives::Bytes16 upcast_vector(uint64_t stored, float scale) {
  primitives::Bytes16 chunk;
  Stored numbers[kChunkElems];
  memcpy(numbers, &stored, sizeof(numbers));
  SA_UNROLL
  for (int i = 0; i < kChunkElems; i += 2) {
    chunk.word[i / 2] =
        primitives::pack<Element>(upcast(numbers[i]) * scale, upcast(numbers[i + 1]) * scale);
  }
  return chunk;
}

// The keys (or values) of one sequence and kv head. Kept small, since it lives in registers as long
// as the kernel runs: strides and sizes are read from the problem, which lies in constant memory,
// anew.
template <bool kValues>
struct KeySource {
  const attention::FlashFwdParams& params;
  const char* base;      // of key 0, or of page 0 slot 0 with a block table
  const int32_t* pages;  // the sequence's row of the block table, or null
  const float* scales;   // of page 0 slot 0 where each token has its own, or null
  int sink_end;          // keys that may be read: [0, sink_end) and [begin, end); the others count
  int begin;             // as zeros
  int end;

  SA_DEVICE int dim() const {
    return static_cast<int>(kValues ? params.head_dim_v : params.head_dim);
  }
  SA_DEVICE int64_t row_stride() const {
    return kValues ? params.v_stride_row : params.k_stride_row;
  }
  SA_DEVICE int64_t page_stride() const {
    return kValues ? params.v_stride_batch : params.k_stride_batch;
  }
  SA_DEVICE int64_t scale_stride_page() const {
    return kValues ? params.v_scale_stride_page : params.k_scale_stride_page;
  }
  SA_DEVICE int64_t scale_stride_slot() const {
    return kValues ? params.v_scale_stride_slot : params.k_scale_stride_slot;
  }
  SA_DEVICE bool is_readable(int key) const {
    return key < sink_end || (begin <= key && key < end);
  }

  template <class Stored>
  SA_DEVICE const Stored* origin() const {
    return reinterpret_cast<const Stored*>(base);
  }
  // Whether the cache has a page that a block table names: nobody has looked at it on the host.
  SA_DEVICE bool has_page(int page) const {
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(params.num_pages);
  }
  // Null where the cache does not have the page: the key counts as zeros.
  template <class Stored>
  SA_DEVICE const Stored* row_in_page(int key) const {
    const int page_size = static_cast<int>(params.page_size);
    const int entry = key / page_size;
    const int page = primitives::load_global(pages + entry);
    if (!has_page(page)) return nullptr;
    return origin<Stored>() + page * page_stride() + (key - entry * page_size) * row_stride();
  }
  template <class Stored>
  SA_DEVICE const Stored* row(int key) const {
    if (!is_readable(key)) return nullptr;
    return pages == nullptr ? origin<Stored>() + key * row_stride() : row_in_page<Stored>(key);
  }
};

// What a kv head's stored numbers are to be multiplied with; 1 but for 8 bits with one scale for
// all of its tokens, which scores and results are multiplied with instead.
SA_DEVICE float cache_scale(const float* scales, const attention::FlashFwdParams& params,
                            int kv_head) {
  return scales == nullptr ? 1.0f
                           : primitives::load_global(scales + kv_head * params.kv_scale_stride);
}

template <bool kValues>
SA_DEVICE KeySource<kValues> key_source(const attention::FlashFwdParams& params, int batch_idx,
                                        int kv_head, const attention::SeqlenInfo& info,
                                        attention::KeySet visible) {
  const attention::KeyRows rows =
      kValues ? attention::value_rows(params, batch_idx, info, kv_head, visible)
              : attention::key_rows(params, batch_idx, info, kv_head, visible);
  return {params,
          rows.base,
          rows.pages,
          rows.token_scales,
          static_cast<int>(rows.readable.sink_end),
          static_cast<int>(rows.readable.window.begin),
          static_cast<int>(rows.readable.window.end)};
}

}  // namespace sink_attention::cuda
