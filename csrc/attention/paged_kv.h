// Where the keys or values of one sequence and one kv head lie: in a tensor, or in pages of a
// cache.
#pragma once

#include "attention/host_device.h"
#include "attention/mask.h"
#include "attention/params.h"
#include "attention/seqlen_info.h"

namespace sink_attention::attention {

SA_HOST_DEVICE int64_t bytes_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat64:
      return 8;
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat8E4M3:
    case DataType::kInt8:
      return 1;
    default:
      return 2;
  }
}

// The element types that only a cache has, with scales.
SA_HOST_DEVICE bool is_8_bit(DataType dtype) { return bytes_of(dtype) == 1; }

struct KeyRows {
  const char* base;      // key 0; with a block table: page 0, slot 0
  const int32_t* pages;  // the sequence's row of the block table; null: key j is at j * row_bytes
  int64_t row_bytes;
  int64_t page_bytes;
  int64_t page_size;
  int64_t num_pages;  // of the cache
  int page_shift;     // log2(page_size); -1 where page_size is no power of two
  // The keys that may be read; all others count as zeros. They lie beyond the sequence, or no query
  // sees them: a windowed layer's older pages may be freed, and their table entries hold anything.
  KeySet readable;
  int64_t dim;
  DataType dtype;
  float scale;                // row = stored * scale; 1 but for 8-bit types
  const float* token_scales;  // page 0, slot 0: each token's scale, used instead; may be null
  int64_t scale_stride_page;
  int64_t scale_stride_slot;

  SA_HOST_DEVICE bool is_readable(int64_t key) const { return readable.holds(key); }

  // Whether the page in the key's table entry exists. Where the block table is unchecked, kernels
  // ask this before they read a readable key; if it is false, the key counts as zeros.
  SA_HOST_DEVICE bool is_in_cache(int64_t key) const {
    if (pages == nullptr) return true;
    const int64_t page = pages[page_shift >= 0 ? key >> page_shift : key / page_size];
    return 0 <= page && page < num_pages;
  }

  SA_HOST_DEVICE const void* row(int64_t key) const {
    if (pages == nullptr) return base + key * row_bytes;
    const int64_t page = page_shift >= 0 ? key >> page_shift : key / page_size;
    return base + pages[page] * page_bytes + (key - page * page_size) * row_bytes;
  }

  // The address of the key's own scale. Only with token_scales, and so with pages.
  SA_HOST_DEVICE const float* token_scale(int64_t key) const {
    const int64_t page = page_shift >= 0 ? key >> page_shift : key / page_size;
    return token_scales + pages[page] * scale_stride_page +
           (key - page * page_size) * scale_stride_slot;
  }
};

namespace internal {
SA_HOST_DEVICE KeyRows rows_of(const FlashFwdParams& params, int64_t batch_idx,
                               const SeqlenInfo& info, int64_t head_idx, KeySet readable,
                               const void* tensor, int64_t stride_batch, int64_t stride_row,
                               int64_t stride_head, int64_t dim, const float* scale) {
  const int64_t bytes = bytes_of(params.kv_dtype);
  KeyRows rows{};
  rows.base = static_cast<const char*>(tensor) + head_idx * stride_head * bytes;
  rows.row_bytes = stride_row * bytes;
  rows.readable = {readable.sink_end, intersect(readable.window, {0, info.seqlen_k})};
  rows.dim = dim;
  rows.dtype = params.kv_dtype;
  rows.scale = scale == nullptr ? 1.0f : scale[head_idx * params.kv_scale_stride];
  if (params.block_table != nullptr) {
    rows.pages = params.block_table + batch_idx * params.block_table_stride;
    rows.page_bytes = stride_batch * bytes;
    rows.page_size = params.page_size;
    rows.num_pages = params.num_pages;
    rows.page_shift = -1;
    for (int shift = 0; shift < 31; ++shift) {
      if (int64_t{1} << shift == params.page_size) rows.page_shift = shift;
    }
  } else {
    rows.base += (info.k_batch * stride_batch + info.k_row * stride_row) * bytes;
  }
  return rows;
}
}  // namespace internal

SA_HOST_DEVICE KeyRows key_rows(const FlashFwdParams& params, int64_t batch_idx,
                                const SeqlenInfo& info, int64_t head_idx, KeySet readable) {
  KeyRows rows = internal::rows_of(params, batch_idx, info, head_idx, readable, params.k,
                                   params.k_stride_batch, params.k_stride_row, params.k_stride_head,
                                   params.head_dim, params.k_scale);
  if (params.k_token_scales != nullptr) {
    rows.token_scales = params.k_token_scales + head_idx * params.k_scale_stride_head;
    rows.scale_stride_page = params.k_scale_stride_page;
    rows.scale_stride_slot = params.k_scale_stride_slot;
  }
  return rows;
}

SA_HOST_DEVICE KeyRows value_rows(const FlashFwdParams& params, int64_t batch_idx,
                                  const SeqlenInfo& info, int64_t head_idx, KeySet readable) {
  KeyRows rows = internal::rows_of(params, batch_idx, info, head_idx, readable, params.v,
                                   params.v_stride_batch, params.v_stride_row, params.v_stride_head,
                                   params.head_dim_v, params.v_scale);
  if (params.v_token_scales != nullptr) {
    rows.token_scales = params.v_token_scales + head_idx * params.v_scale_stride_head;
    rows.scale_stride_page = params.v_scale_stride_page;
    rows.scale_stride_slot = params.v_scale_stride_slot;
  }
  return rows;
}

}  // namespace sink_attention::attention
