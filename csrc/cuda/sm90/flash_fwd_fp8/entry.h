// Hopper's forward on float8 q, k and v: dense and varlen, bfloat16 results.
#pragma once

#include "cuda/registry.h"
#include "cuda/sm90/flash_fwd_fp8/config.h"

namespace sink_attention::cuda::sm90 {

// out and lse of each row that a sequence has. Only with batch, seqlen_q and num_heads_q above 0;
// seqlen_k may be 0.
template <int kHeadDim>
SA_LAUNCH launch_flash_fwd_fp8(const FlashFwdFp8Call& call);

// Whatever the results' layout.
inline const char* why_not_flash_fwd_fp8(const CallShape& shape) {
  if (shape.dtype != attention::DataType::kFloat8E4M3) return "q is not float8_e4m3fn";
  if (shape.is_paged || shape.has_tree_mask) return "it is over a paged cache";
  if (!shape.q.is_vectorised(shape.head_dim, 1) || !shape.k.is_vectorised(shape.head_dim, 1) ||
      !shape.v.is_vectorised(shape.head_dim_v, 1)) {
    return "rows of q, k or v are not in aligned parts of 16 bytes";
  }
  return nullptr;
}

}  // namespace sink_attention::cuda::sm90
