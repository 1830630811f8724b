// The problem structs: one per op, the whole interface between the rings.
//
// csrc/torch fills them by member name, the backends read them. Plain data for host and device: no
// ownership, no torch. Strides count elements; the last dimension of every tensor has stride 1.
#pragma once

#include <cstdint>

namespace sink_attention::attention {

constexpr int64_t kMaxHeadDim = 256;  // of head_dim and head_dim_v, on every backend

enum class DataType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt8 };

// Forward attention: dense, varlen and paged are one computation that differs in where a row lies.
//   dense    cu_seqlens_q and cu_seqlens_k null: sequence b is row b of the batch dimension
//   varlen   cu_seqlens_q and cu_seqlens_k given: sequence b is rows [cu[b], cu[b + 1])
//   paged    block_table given: key j of sequence b lies in page block_table[b][j / page_size],
//   slot j % page_size;
//            its queries are dense or by cu_seqlens_q, its key count is seqused_k[b]
struct FlashFwdParams {
  DataType dtype;        // of q and out; of k and v too unless kv_dtype has 8 bits
  DataType kv_dtype;     // of k and v
  DataType s_aux_dtype;  // none of 8 bits; meaningless where s_aux is null
  const void* q;  // [batch, seqlen_q, num_heads_q, head_dim] or [total_q, num_heads_q, head_dim]
  const void* k;  // [batch, seqlen_k, num_heads_kv, head_dim], [total_k, ...] or [num_pages,
                  // page_size, ...]
  const void* v;  // like k with head_dim_v
  const void* s_aux;  // [num_heads_q], a natural logit per head, never scaled; may be null
  void* out;  // [batch, seqlen_q, num_heads_q, head_dim_v] or [total_q, num_heads_q, head_dim_v]
  void* lse;  // float32 (float64 where dtype is): natural log, sink included; [batch, heads,
              // seqlen_q] or [heads, total_q]; last stride 1
  const int32_t* cu_seqlens_q;  // [batch + 1], may be null
  const int32_t* cu_seqlens_k;  // [batch + 1], may be null
  const int32_t*
      seqused_k;  // [batch], may be null: only the first seqused_k[b] keys of sequence b count
  const int32_t* block_table;  // [batch, max_pages_per_seq], may be null
  // 8-bit k: k = stored * scale, with either of these, the other null; other dtypes: both null.
  const float* k_scale;         // [1] or [num_heads_kv]
  const float* k_token_scales;  // [num_pages, page_size, num_heads_kv]; only with a block table
  const float* v_scale;         // likewise
  const float* v_token_scales;
  int64_t q_stride_batch, q_stride_row, q_stride_head;  // batch strides are 0 and unused in varlen
  int64_t k_stride_batch, k_stride_row,
      k_stride_head;  // paged: k_stride_batch is the stride of a page
  int64_t v_stride_batch, v_stride_row, v_stride_head;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t lse_stride_batch, lse_stride_head;
  int64_t block_table_stride;
  int64_t kv_scale_stride;  // 0: one scale for all heads, 1: one per kv head
  int64_t k_scale_stride_page, k_scale_stride_slot, k_scale_stride_head;  // of the token scales
  int64_t v_scale_stride_page, v_scale_stride_slot, v_scale_stride_head;
  int64_t batch;
  int64_t seqlen_q;  // dense: the length; varlen: the largest (max_seqlen_q)
  int64_t seqlen_k;  // dense: the length; varlen: the largest; paged: max_pages_per_seq * page_size
  int64_t total_q;   // rows of q over the whole batch, those in no sequence too
  int64_t total_k;   // likewise of k; 0 with a block table
  int64_t num_heads_q, num_heads_kv;
  int64_t head_dim, head_dim_v;
  int64_t page_size;        // tokens a page; 0 unless block_table is given
  int64_t num_pages;        // of the cache; likewise
  int64_t window_left;      // visible: p - window_left <= j <= p + window_right, p = i + seqlen_k -
                            // seqlen_q
  int64_t window_right;     // -1: unbounded; causal arrives as window_right = 0
  int64_t num_sink_tokens;  // the first keys, which stay visible beside the window (mask.h)
  const int64_t* tree_mask;  // [batch, seqlen_q] or [total_q], may be null: bit d of a query's word
                             // says that draft token d is itself or its ancestor (mask.h)
  int64_t tree_mask_stride;  // of a sequence; 0 and unused with cu_seqlens_q
  int64_t num_splits;  // parts of the key range computed apart and merged; 0: the backend chooses,
                       // 1: never, and by kernels in which a row's sums have one order, whatever
                       // the rows and sequences beside it (batch-invariant)
  double softmax_scale;
  double softcap;  // 0: none
};

// Backward of FlashFwdParams (dense or varlen). fwd.out and fwd.lse are the forward's results,
// read only.
struct FlashBwdParams {
  FlashFwdParams fwd;
  const void* dout;  // like fwd.out, own strides
  const void* dlse;  // like fwd.lse, own strides; may be null
  void* dq;          // like fwd.q
  void* dk;  // like fwd.k: rows beyond seqused_k, or in no sequence, are left alone (arrive zeroed)
  void* dv;  // like fwd.v
  void* ds_aux;  // [num_heads_q] in s_aux_dtype; null where s_aux is
  int64_t dout_stride_batch, dout_stride_row, dout_stride_head;
  int64_t dlse_stride_batch, dlse_stride_head, dlse_stride_row;
  int64_t dq_stride_batch, dq_stride_row, dq_stride_head;
  int64_t dk_stride_batch, dk_stride_row, dk_stride_head;
  int64_t dv_stride_batch, dv_stride_row, dv_stride_head;
  bool deterministic;  // the CPU's gradients are bitwise repeatable either way
};

// Writes k and v of each token at slot_mapping[token] = page * page_size + slot; -1 skips the
// token.
struct ReshapeAndCacheParams {
  DataType dtype;               // of k and v
  DataType cache_dtype;         // dtype, or of 8 bits: stored = k / scale, saturated
  const void* k;                // [num_tokens, num_heads_kv, head_dim]
  const void* v;                // [num_tokens, num_heads_kv, head_dim_v]
  void* k_cache;                // [num_pages, page_size, num_heads_kv, head_dim]
  void* v_cache;                // [num_pages, page_size, num_heads_kv, head_dim_v]
  const int64_t* slot_mapping;  // [num_tokens]
  const float* k_scale;         // [1] or [num_heads_kv]; 8 bits only
  const float* v_scale;
  // [num_pages, page_size, num_heads_kv]: written, with the largest finite magnitude of a token's
  // head over the largest number of cache_dtype, in the place of k_scale and v_scale; 8 bits only
  float* k_token_scales;
  float* v_token_scales;
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head;
  int64_t k_cache_stride_page, k_cache_stride_slot, k_cache_stride_head;
  int64_t v_cache_stride_page, v_cache_stride_slot, v_cache_stride_head;
  int64_t kv_scale_stride;  // 0: one scale for all heads, 1: one per kv head
  int64_t k_scale_stride_page, k_scale_stride_slot, k_scale_stride_head;  // of the token scales
  int64_t v_scale_stride_page, v_scale_stride_slot, v_scale_stride_head;
  int64_t num_tokens, num_heads_kv, head_dim, head_dim_v, num_pages, page_size;
};

// out = sum_p exp(lse_p - lse) * out_p,  lse = log(sum_p exp(lse_p) + exp(s_aux)); a partial lse of
// +inf reads as -inf (an empty part in FlashAttention-2's convention).
struct MergeParams {
  DataType dtype;  // of the partial outputs and out
  DataType s_aux_dtype;
  const void* const*
      outs;  // num_parts pointers to [rows, num_heads, head_dim] (rows = batch * seqlen, or total)
  const void* const*
      lses;  // num_parts pointers; float32 (float64 where dtype is), [batch, num_heads, seqlen]
  const void* s_aux;  // [num_heads], may be null
  void* out;          // [batch, seqlen, num_heads, head_dim], contiguous like the parts
  void* lse;          // [batch, num_heads, seqlen], contiguous like the parts
  int64_t num_parts, batch, seqlen, num_heads, head_dim;  // varlen: batch = 1, seqlen = total
};

}  // namespace sink_attention::attention
