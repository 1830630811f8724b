// PackGQA: the rows of a kv head are all (query position, query head) pairs, position-major. So one
// tile of K and V serves all query heads of the kv head.
//
//     row r  =  position r / qhead_per_khead,
//               query head kv_head * qhead_per_khead + r % qhead_per_khead
//
// With 8 query heads per kv head:
//   decode    one query position fills half of a 16-row product instead of a sixteenth
//   prefill   a tile of 128 rows spans 16 positions, so few masked keys are multiplied at an edge
#pragma once

#include "attention/mask.h"
#include "attention/seqlen_info.h"

namespace sink_attention::cuda {

struct PackGqa {
  attention::SeqlenInfo info;
  int qhead_per_khead;
  int kv_head;
  int num_rows;  // seqlen_q * qhead_per_khead

  SA_HOST_DEVICE int position(int row) const { return row / qhead_per_khead; }
  SA_HOST_DEVICE int head(int row) const {
    return kv_head * qhead_per_khead + row % qhead_per_khead;
  }
  // Element offset of a row in a tensor of the given strides.
  SA_HOST_DEVICE int64_t offset(int row, int64_t stride_batch, int64_t stride_row,
                                int64_t stride_head) const {
    return info.q_batch * stride_batch + (info.q_row + position(row)) * stride_row +
           head(row) * stride_head;
  }
  SA_HOST_DEVICE int64_t lse_offset(int row, int64_t stride_batch, int64_t stride_head) const {
    return info.q_batch * stride_batch + head(row) * stride_head + info.q_row + position(row);
  }
};

SA_HOST_DEVICE PackGqa pack_gqa(const attention::FlashFwdParams& params, int batch_idx,
                                int kv_head) {
  PackGqa rows{};
  rows.info = attention::seqlen_info(params, batch_idx);
  rows.qhead_per_khead = static_cast<int>(params.num_heads_q / params.num_heads_kv);
  rows.kv_head = kv_head;
  rows.num_rows = static_cast<int>(rows.info.seqlen_q) * rows.qhead_per_khead;
  return rows;
}

}  // namespace sink_attention::cuda
