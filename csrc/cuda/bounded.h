// Limits a call to what kernels can count in ints.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/call_shape.h"

namespace sink_attention::cuda {

// Most PackGQA rows of a kv head, and most keys. A tile beyond the last one still fits into an int.
constexpr int64_t kMaxCount = INT32_MAX - 1023;
constexpr int64_t kMaxGridY = 65535;  // CTAs along a grid's second dimension

// Throws std::runtime_error if there are more rows or keys. A paged cache's seqlen_k is clamped
// instead, since a block table may have more entries than any sequence needs. Lengths in device
// memory are clamped to these limits where they are read (attention/seqlen_info.h).
inline CallShape bounded(CallShape shape) {
  const int64_t rows = shape.is_packed_q ? shape.total_q : shape.seqlen_q;
  const int64_t keys = shape.is_packed_k ? shape.total_k : shape.seqlen_k;
  if (rows * shape.qhead_per_khead() > kMaxCount || (!shape.is_paged && keys > kMaxCount)) {
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
  }
  if (shape.is_paged) {
    shape.seqlen_k = shape.num_pages == 0 ? 0 : std::min(shape.seqlen_k, kMaxCount);
    shape.num_pages = std::min<int64_t>(shape.num_pages, INT32_MAX);
  }
  return shape;
}

}  // namespace sink_attention::cuda
