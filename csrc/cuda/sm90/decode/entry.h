// Hopper's decode: few query rows over a paged cache, whose keys are split among warps and blocks.
#pragma once

#include "attention/paged_kv.h"
#include "cuda/registry.h"
#include "cuda/sm90/decode/config.h"

namespace sink_attention::cuda::sm90 {

// out and lse of each row that a sequence has, sink included, from plan.num_splits parts of its
// keys. Only with batch, seqlen_q and num_heads_q above 0.
template <int kHeadDim, int kHeadDimV>
SA_LAUNCH launch_decode(const FlashFwdCall& call);

// num_splits == 1 is never taken, since there a row's sums must have prefill's order.
inline const char* why_not_decode(const CallShape& shape) {
  if (!shape.is_paged) return "k and v are not in a paged cache";
  if (shape.num_splits == 1) return "num_splits is 1";
  if (!shape.is_16_bit()) return "q is neither bfloat16 nor float16";
  if (shape.pack_gqa_rows() > kManyRows) {
    return "a kv head's query heads times seqlen_q are more than 64 rows";
  }
  const int64_t bytes = attention::bytes_of(shape.kv_dtype);
  if (!shape.k.is_vectorised(shape.head_dim, bytes) ||
      !shape.v.is_vectorised(shape.head_dim_v, bytes)) {
    return "rows of k or v are not in aligned parts of 16 bytes";
  }
  const auto vectors = [&](const RowLayout& layout) {
    return (shape.num_pages * layout.stride_batch + shape.page_size * layout.stride_row) * bytes /
           16;
  };
  constexpr int64_t kMaxVectors = (int64_t{1} << 32) - 1;
  if (vectors(shape.k) >= kMaxVectors || vectors(shape.v) >= kMaxVectors) {
    return "a cache has 64 GiB or more";
  }
  return nullptr;
}

}  // namespace sink_attention::cuda::sm90
