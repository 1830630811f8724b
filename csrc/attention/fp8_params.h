// The parameter struct of attention on float8 q, k and v.
#pragma once

#include "attention/params.h"

namespace sink_attention::attention {

// The factor that dequantises a sequence's and kv head's stored elements.
struct Descale {
  const float* data;  // [batch, num_heads_kv]; null: 1
  int64_t stride_batch, stride_head;
};

// Forward, dense or varlen: k = stored * k_descale[batch][kv head], v likewise. q takes q_descale
// of the kv head that its query head reads.
struct FlashFwdFp8Params {
  FlashFwdParams fwd;  // dtype and kv_dtype are kFloat8E4M3; out is bfloat16, lse float32
  Descale q_descale, k_descale, v_descale;
};

}  // namespace sink_attention::attention
