// A problem whose rows and keys kernels can count in ints.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "attention/params.h"

namespace sink_attention::cuda {

// Of rows of a kv head and of keys: an int has room for a tile beyond the last one.
constexpr int64_t kMaxCount = INT32_MAX - 1023;
constexpr int64_t kMaxGridY = 65535;  // thread blocks along a grid's second dimension

// Throws std::runtime_error where there are more. Of a cache the keys that there can be are bounded
// instead: a block table may have more entries than any sequence needs. Lengths in device memory
// are bounded by these where they are read (attention/seqlen_info.h).
inline attention::FlashFwdParams bounded(attention::FlashFwdParams params) {
  const int64_t qhead_per_khead =
      params.num_heads_q / std::max<int64_t>(params.num_heads_kv, 1);  // q may have no heads
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
