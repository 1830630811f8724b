// Where one sequence of the batch lies and how long it is, for dense, varlen and paged calls.
#pragma once

#include "attention/host_device.h"
#include "attention/params.h"

namespace sink_attention::attention {

struct SeqlenInfo {
  int64_t q_batch;  // batch index of q, out and lse; 0 in varlen
  int64_t q_row;    // the sequence's first row there
  int64_t seqlen_q;
  int64_t k_batch;  // batch index of k and v; meaningless with a block table
  int64_t k_row;
  int64_t seqlen_k;  // after seqused_k
};

// `row` clamped to [0, total].
SA_HOST_DEVICE int64_t bounded_row(int64_t row, int64_t total) {
  const int64_t positive = row > 0 ? row : 0;
  return positive < total ? positive : total;
}

// cu_seqlens and seqused_k may be unchecked: on CUDA they are in device memory. Whatever they hold,
// the sequence's query rows stay within q, and its keys within its rows of k or its block table
// row.
SA_HOST_DEVICE SeqlenInfo seqlen_info(const FlashFwdParams& params, int64_t batch_idx) {
  SeqlenInfo info{};
  if (params.cu_seqlens_q != nullptr) {
    info.q_row = bounded_row(params.cu_seqlens_q[batch_idx], params.total_q);
    info.seqlen_q =
        bounded_row(params.cu_seqlens_q[batch_idx + 1] - info.q_row, params.total_q - info.q_row);
  } else {
    info.q_batch = batch_idx;
    info.seqlen_q = params.seqlen_q;
  }
  if (params.cu_seqlens_k != nullptr) {
    info.k_row = bounded_row(params.cu_seqlens_k[batch_idx], params.total_k);
    info.seqlen_k =
        bounded_row(params.cu_seqlens_k[batch_idx + 1] - info.k_row, params.total_k - info.k_row);
  } else {
    info.k_batch = batch_idx;
    info.seqlen_k = params.seqlen_k;
  }
  if (params.seqused_k != nullptr) {
    info.seqlen_k = bounded_row(params.seqused_k[batch_idx], info.seqlen_k);
  }
  return info;
}

}  // namespace sink_attention::attention
