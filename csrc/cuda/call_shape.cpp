#include "cuda/call_shape.h"

namespace sink_attention::cuda {
namespace {

RowLayout layout_of(const void* base, int64_t stride_batch, int64_t stride_row,
                    int64_t stride_head) {
  return {reinterpret_cast<uintptr_t>(base) % 16 == 0, stride_batch, stride_row, stride_head};
}

}  // namespace

CallShape shape_of(const attention::FlashFwdParams& params) {
  CallShape shape{};
  shape.dtype = params.dtype;
  shape.kv_dtype = params.kv_dtype;
  shape.is_paged = params.block_table != nullptr;
  shape.is_packed_q = params.cu_seqlens_q != nullptr;
  shape.is_packed_k = params.cu_seqlens_k != nullptr;
  shape.has_tree_mask = params.tree_mask != nullptr;
  shape.has_sink = params.s_aux != nullptr;
  shape.batch = params.batch;
  shape.seqlen_q = params.seqlen_q;
  shape.seqlen_k = params.seqlen_k;
  shape.total_q = params.total_q;
  shape.total_k = params.total_k;
  shape.num_heads_q = params.num_heads_q;
  shape.num_heads_kv = params.num_heads_kv;
  shape.head_dim = params.head_dim;
  shape.head_dim_v = params.head_dim_v;
  shape.page_size = params.page_size;
  shape.num_pages = params.num_pages;
  shape.window_left = params.window_left;
  shape.window_right = params.window_right;
  shape.num_sink_tokens = params.num_sink_tokens;
  shape.num_splits = params.num_splits;
  shape.q = layout_of(params.q, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
  shape.k = layout_of(params.k, params.k_stride_batch, params.k_stride_row, params.k_stride_head);
  shape.v = layout_of(params.v, params.v_stride_batch, params.v_stride_row, params.v_stride_head);
  shape.out =
      layout_of(params.out, params.out_stride_batch, params.out_stride_row, params.out_stride_head);
  return shape;
}

CallShape shape_of(const attention::FlashFwdFp8Params& params) { return shape_of(params.fwd); }

CallShape shape_of(const attention::FlashBwdParams& params) {
  CallShape shape = shape_of(params.fwd);
  shape.deterministic = params.deterministic;
  shape.dout = layout_of(params.dout, params.dout_stride_batch, params.dout_stride_row,
                         params.dout_stride_head);
  shape.dk =
      layout_of(params.dk, params.dk_stride_batch, params.dk_stride_row, params.dk_stride_head);
  shape.dv =
      layout_of(params.dv, params.dv_stride_batch, params.dv_stride_row, params.dv_stride_head);
  return shape;
}

}  // namespace sink_attention::cuda
