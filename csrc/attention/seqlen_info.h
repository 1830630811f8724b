// Where one sequence of the batch lies and how long it is: the same answer for dense, varlen and
// paged problems.
#pragma once

#include "attention/host_device.h"
#include "attention/params.h"

namespace sink_attention::attention {

struct SeqlenInfo {
  int64_t q_batch;  // index to multiply q's (out's, lse's) batch stride with; 0 in varlen
  int64_t q_row;    // first row of the sequence there
  int64_t seqlen_q;
  int64_t k_batch;  // the same for k and v; meaningless where a block table says where keys lie
  int64_t k_row;
  int64_t seqlen_k;  // keys that count
};

// `row` if it lies in [0, total], else the nearer end.
SA_HOST_DEVICE int64_t bounded_row(int64_t row, int64_t total) {
  const int64_t positive = row > 0 ? row : 0;
  return positive < total ? positive : total;
}

// Nobody may have looked at what cu_seqlens and seqused_k hold: on CUDA they are in device memory.
// Whatever it is, the sequence's rows lie within the tensors, and its keys within its rows of k, or
// the entries of its row of the block table.
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
