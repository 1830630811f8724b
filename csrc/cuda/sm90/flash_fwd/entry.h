// Hopper's forward: all rows through prefill tiles, whatever the lengths; dense, varlen and paged.
//
// Which calls it takes follows from types, head_dim and layout alone, never from lengths, batch or
// windows: a row's result is bitwise the same alone, in a batch, in chunks and over a cache, so all
// of these calls must come here or none. Decodes are not its own (sm80/flash_fwd/entry.h).
#pragma once

#include "cuda/registry.h"
#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm90/decode/entry.h"
#include "cuda/sm90/flash_fwd/config.h"

namespace sink_attention::cuda::sm90 {

// out and lse of each row that a sequence has, sink included. Only with batch, seqlen_q and
// num_heads_q above 0; seqlen_k may be 0.
template <int kHeadDim, int kHeadDimV>
SA_LAUNCH launch_flash_fwd(const FlashFwdCall& call);

inline const char* why_not_flash_fwd(const CallShape& shape) {
  if (!shape.is_16_bit()) return "q is neither bfloat16 nor float16";
  if (sm80::is_decode(shape)) return why_not_decode(shape);
  if (shape.kv_dtype != shape.dtype) return "k and v are not of q's dtype";
  if (std::max(shape.head_dim, shape.head_dim_v) <= 32) {
    return "head_dim and head_dim_v are at most 32";
  }
  if (shape.has_tree_mask) return "there is a tree mask";
  if (!shape.q.is_vectorised(shape.head_dim, 2) || !shape.k.is_vectorised(shape.head_dim, 2) ||
      !shape.v.is_vectorised(shape.head_dim_v, 2) ||
      !shape.out.is_vectorised(shape.head_dim_v, 2)) {
    return "rows of q, k, v or out are not in aligned parts of 16 bytes";
  }
  if (shape.num_splits > 1) return "num_splits is above 1, and these are too many rows to decode";
  return nullptr;
}

}  // namespace sink_attention::cuda::sm90
