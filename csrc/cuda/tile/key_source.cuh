// Addresses of a sequence's keys or values, contiguous or paged, and the upcast of 8-bit caches.
#pragma once

#include <cstring>

#include "attention/paged_kv.h"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/convert.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// 8-bit elements [first, first + 8) of a row; zeros from cols on.
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

SA_DEVICE float upcast(attention::Int8 element) { return attention::to_float(element); }

// The float8 bits, shifted to a float's exponent and mantissa, give value * 2^-120. That holds for
// subnormals too, since GPUs compute with them at full precision. 0x7f and 0xff are NaN.
SA_DEVICE float upcast(attention::Float8E4M3 element) {
  const uint32_t extended = static_cast<uint32_t>(static_cast<int8_t>(element.bits));
  const float value = attention::float_of((extended << 20) & 0x87f00000u) * 0x1p120f;
  return (element.bits & 0x7fu) == 0x7fu ? attention::float_of(0x7fc00000u) : value;
}

// Dequantises eight elements: value * scale, rounded to Element. Exact where the scale is 1.
template <class Element, class Stored>
SA_DEVICE primitives::Bytes16 upcast_vector(uint64_t stored, float scale) {
  primitives::Bytes16 chunk;
  Stored elements[kChunkElems];
  memcpy(elements, &stored, sizeof(elements));
  SA_UNROLL
  for (int i = 0; i < kChunkElems; i += 2) {
    chunk.word[i / 2] =
        primitives::pack<Element>(upcast(elements[i]) * scale, upcast(elements[i + 1]) * scale);
  }
  return chunk;
}

// The keys (or values) of one sequence and kv head. It stays in registers for the whole kernel, so
// it is small: strides and sizes are read from the params, in constant memory, at each use.
template <bool kValues>
struct KeySource {
  const attention::FlashFwdParams& params;
  const char* base;      // address of key 0; with a block table, of page 0 slot 0
  const int32_t* pages;  // the sequence's row of the block table, or null
  const float* scales;   // address of the scale of page 0 slot 0, if tokens have scales; or null
  // Keys [0, sink_end) and [begin, end) may be read. The others count as zeros.
  int sink_end;
  int begin;
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
  // Whether a page number of the block table is in range. The host has not checked it.
  SA_DEVICE bool has_page(int page) const {
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(params.num_pages);
  }
  // The key's address, or null if its page is out of range: the key counts as zeros.
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

// The scale of an 8-bit cache per tensor or kv head, which is applied to scores and outputs. 1
// without one.
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
