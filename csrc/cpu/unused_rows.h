// Rows of packed tensors that no sequence has: attention leaves them alone.
#pragma once

#include "attention/mask.h"
#include "attention/params.h"
#include "attention/seqlen_info.h"

namespace sink_attention::cpu {

// The rows of packed sequence batch_idx, within the tensor whatever cu_seqlens holds.
inline attention::Range packed_rows(const int32_t* cu_seqlens, int64_t batch_idx, int64_t total) {
  const int64_t begin = attention::bounded_row(cu_seqlens[batch_idx], total);
  const int64_t count = attention::bounded_row(cu_seqlens[batch_idx + 1] - begin, total - begin);
  return {begin, begin + count};
}

// out = 0 and lse = -inf in rows of q that are in no sequence; only packed, with out and lse.
void fill_unused_rows(const attention::AppendKvParams& params);

}  // namespace sink_attention::cpu
