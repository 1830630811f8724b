// Limits a call to what kernels can count in ints.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "attention/params.h"

namespace sink_attention::cuda {

// Most PackGQA rows of a kv head, and most keys. A tile beyond the last one still fits into an int.
constexpr int64_t kMaxCount = INT32_MAX - 1023;
constexpr int64_t kMaxGridY = 65535;  // CTAs along a grid's second dimension

// Throws std::runtime_error if there are more rows or keys. A paged cache's seqlen_k is clamped
// instead, since a block table may have more entries than any sequence needs. Lengths in device
// memory are clamped to these limits where they are read (attention/seqlen_info.h).
inline attention::FlashFwdParams bounded(attention::FlashFwdParams params) {
  const int64_t qhead_per_khead =
      params.num_heads_q / std::max<int64_t>(params.num_heads_kv, 1);  // num_heads_kv may be 0
  const int64_t rows = params.cu_seqlens_q != nullptr ? params.total_q : params.seqlen_q;
  const int64_t keys = params.cu_seqlens_k != nullptr ? params.total_k : params.seqlen_k;
  const bool is_paged = params.block_table != nullptr;
  if (rows * qhead_per_khead > kMaxCount || (!is_paged && keys > kMaxCount)) {
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
  }
  if (is_paged) {
    params.seqlen_k = params.num_pages == 0 ? 0 : std::min(params.seqlen_k, kMaxCount);
    params.num_pages = std::min<int64_t>(params.num_pages, INT32_MAX);
  }
  return params;
}

}  // namespace sink_attention::cuda
