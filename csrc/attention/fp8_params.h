// The problem struct of attention on float8 q, k and v.
#pragma once

#include "attention/params.h"

namespace sink_attention::attention {

// What stored numbers of a sequence and kv head are to be multiplied with.
struct Descale {
  const float* data;  // [batch, num_heads_kv]; null: 1
  int64_t stride_batch, stride_head;
};

// Forward of dense or packed sequences: q = stored * q_descale of the kv head that the query head
// reads, k and v likewise.
struct FlashFwdFp8Params {
  FlashFwdParams fwd;  // dtype and kv_dtype are kFloat8E4M3; out is bfloat16, lse float32
  Descale q_descale, k_descale, v_descale;
};

}  // namespace sink_attention::attention
