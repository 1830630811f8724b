// What a plan looks at of a call: shapes, strides, dtypes, which optional tensors there are, and
// whether a tensor begins at a multiple of 16 bytes. No pointer, so that a call can be planned
// before its tensors exist.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/fp8_params.h"
#include "attention/params.h"

namespace sink_attention::cuda {

// Where a tensor's rows lie. Strides in elements.
struct RowLayout {
  bool is_aligned = true;  // the tensor begins at a multiple of 16 bytes
  int64_t stride_batch = 0;
  int64_t stride_row = 0;
  int64_t stride_head = 0;

  // Whether every row of `cols` elements can be read and written 16 bytes at a time.
  bool is_vectorised(int64_t cols, int64_t element_bytes) const {
    return is_aligned && (cols | stride_batch | stride_row | stride_head) * element_bytes % 16 == 0;
  }
};

// One struct for all attention ops; the names are those of attention/params.h.
struct CallShape {
  attention::DataType dtype = attention::DataType::kBFloat16;
  attention::DataType kv_dtype = attention::DataType::kBFloat16;
  bool is_paged = false;
  bool is_packed_q = false;  // cu_seqlens_q
  bool is_packed_k = false;
  bool has_tree_mask = false;
  bool has_sink = false;
  bool deterministic = false;  // of the backward
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t total_q = 0;
  int64_t total_k = 0;
  int64_t num_heads_q = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  int64_t page_size = 0;
  int64_t num_pages = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t num_sink_tokens = 0;
  int64_t num_splits = 0;
  RowLayout q, k, v, out;
  RowLayout dout, dk, dv;  // of the backward

  bool is_16_bit() const {
    return dtype == attention::DataType::kBFloat16 || dtype == attention::DataType::kFloat16;
  }
  int64_t qhead_per_khead() const {
    return num_heads_q / std::max<int64_t>(num_heads_kv, 1);  // there may be no heads
  }
  // PackGQA rows of the longest sequence and one kv head.
  int64_t pack_gqa_rows() const { return seqlen_q * qhead_per_khead(); }
};

CallShape shape_of(const attention::FlashFwdParams& params);
CallShape shape_of(const attention::FlashFwdFp8Params& params);
CallShape shape_of(const attention::FlashBwdParams& params);

}  // namespace sink_attention::cuda
