// The parameter structs, one per op: the whole interface between csrc/torch and the backends.
//
// csrc/torch fills them by member name, the backends read them. Plain data for host and device: no
// ownership, no torch. Strides count elements; the last dimension of every tensor has stride 1.
#pragma once

#include <cstdint>

namespace sink_attention::attention {

enum class DataType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt8 };

// Forward attention. Dense, varlen and paged calls differ only in where a row lies:
//
//   dense    cu_seqlens_q and cu_seqlens_k are null: sequence b is row b of the batch dimension.
//   varlen   cu_seqlens_q and cu_seqlens_k are given: sequence b is rows [cu[b], cu[b + 1]).
//   paged    block_table is given: key j of sequence b lies in page block_table[b][j / page_size],
//            slot j % page_size. Sequence b has seqused_k[b] keys; its queries are dense or varlen.
struct FlashFwdParams {
  DataType dtype;        // of q and out; of k and v too unless kv_dtype has 8 bits
  DataType kv_dtype;     // of k and v
  DataType s_aux_dtype;  // never an 8-bit type; meaningless where s_aux is null

  const void* q;      // [batch, seqlen_q, num_heads_q, head_dim] or [total_q, ...]
  const void* k;      // [batch, seqlen_k, num_heads_kv, head_dim], [total_k, ...] or
                      // [num_pages, page_size, ...]
  const void* v;      // like k, with head_dim_v
  const void* s_aux;  // [num_heads_q]: a natural logit per head, never scaled; may be null
  void* out;          // [batch, seqlen_q, num_heads_q, head_dim_v] or [total_q, ...]
  void* lse;          // [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q]; last stride 1.
                      // Natural log, sink included; float32, or float64 where dtype is

  const int32_t* cu_seqlens_q;  // [batch + 1], may be null
  const int32_t* cu_seqlens_k;  // [batch + 1], may be null
  const int32_t* seqused_k;     // [batch], may be null: sequence b has its first seqused_k[b] keys
  const int32_t* block_table;   // [batch, max_pages_per_seq], may be null

  // 8-bit k: k = stored * scale, with one of these two, the other null. Other dtypes: both null.
  const float* k_scale;         // [1] or [num_heads_kv]
  const float* k_token_scales;  // [num_pages, page_size, num_heads_kv]; only with a block table
  const float* v_scale;         // likewise
  const float* v_token_scales;

  int64_t q_stride_batch, q_stride_row, q_stride_head;  // batch strides are 0 and unused in varlen
  int64_t k_stride_batch, k_stride_row, k_stride_head;  // paged: k_stride_batch is a page's stride
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
  int64_t page_size;  // tokens a page; 0 without a block table
  int64_t num_pages;  // of the cache; 0 without a block table

  // Query i stands at key position p = i + seqlen_k - seqlen_q (mask.h).
  int64_t window_left;      // visible: p - window_left <= j <= p + window_right; -1: unbounded
  int64_t window_right;     // causal arrives as window_right = 0
  int64_t num_sink_tokens;  // the first keys, which stay visible beside the window (mask.h)
  // [batch, seqlen_q] or [total_q], may be null. Bit d of a query's word: draft token d is the
  // query itself or its ancestor (mask.h).
  const int64_t* tree_mask;
  int64_t tree_mask_stride;  // of a sequence; 0 and unused with cu_seqlens_q

  // Parts of the key range that are computed apart and merged. 0: the backend chooses. 1: batch-
  // invariant, by kernels in which the order of a row's sums depends on no other row or sequence.
  int64_t num_splits;
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
  void* dk;          // like fwd.k. Rows beyond seqused_k, or in no sequence, are fill_unused_rows's
  void* dv;          // like fwd.v; the same
  void* ds_aux;      // [num_heads_q] in s_aux_dtype; null where s_aux is
  int64_t dout_stride_batch, dout_stride_row, dout_stride_head;
  int64_t dlse_stride_batch, dlse_stride_head, dlse_stride_row;
  int64_t dq_stride_batch, dq_stride_row, dq_stride_head;
  int64_t dk_stride_batch, dk_stride_row, dk_stride_head;
  int64_t dv_stride_batch, dv_stride_row, dv_stride_head;
  bool deterministic;  // the CPU's gradients are bitwise repeatable either way
};

// New keys and values, and the cache that they are written to: of both ops that write caches.
struct KvWriteParams {
  DataType dtype;        // of k and v
  DataType cache_dtype;  // dtype, or of 8 bits: stored = k / scale, saturated
  const void* k;         // [num_tokens, num_heads_kv, head_dim]
  const void* v;         // [num_tokens, num_heads_kv, head_dim_v]
  void* k_cache;         // [num_pages, page_size, num_heads_kv, head_dim]
  void* v_cache;         // [num_pages, page_size, num_heads_kv, head_dim_v]
  const float* k_scale;  // [1] or [num_heads_kv]; 8 bits only
  const float* v_scale;
  // [num_pages, page_size, num_heads_kv]: written, with the largest finite magnitude of a token's
  // head over the largest value of cache_dtype, in the place of k_scale and v_scale; 8 bits only
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

// Writes k and v of each token at slot_mapping[token] = page * page_size + slot. A token whose slot
// is negative or beyond the cache is skipped.
struct ReshapeAndCacheParams : KvWriteParams {
  const int64_t* slot_mapping;  // [num_tokens]
  // Where tokens share a slot, the last one stays, at the cost of a search through the slots of
  // later tokens. Otherwise on CUDA each 16-byte vector of the slot's rows, and each of its token
  // scales, is of any of these tokens. The CPU is deterministic either way.
  bool deterministic;
};

// Writes k and v of new tokens behind the keys that each sequence has in the cache.
//   dense    cu_seqlens_q null: k and v are [batch, seqlen_new, num_heads_kv, ...]
//   packed   cu_seqlens_q given: the new tokens of sequence b are rows [cu[b], cu[b + 1]) of k and
//            v, as its queries are of q
// Token i of sequence b has position cache_seqlens[b] + i: slot position % page_size of page
// block_table[b][position / page_size]. A token is skipped if it is in no sequence, if its position
// is negative or beyond the table, or if the cache has no such page. Which of two tokens of one
// slot stays is as undefined as in reshape_and_cache without `deterministic`.
struct AppendKvParams : KvWriteParams {
  const int32_t* cu_seqlens_q;   // [batch + 1], may be null
  const int32_t* cache_seqlens;  // [batch]: keys before the append; no memory of seqused_k's
  const int32_t* block_table;    // [batch, max_pages_per_seq]; null: a dense cache, whose page b is
                                 // all that sequence b has
  // [batch], written: keys after the append, in [0, max_pages_per_seq * page_size], as attention
  // would clamp them.
  int32_t* seqused_k;
  // [batch], written with 0, 1, ...: the block table of a dense cache, for attention. May be null.
  int32_t* page_table;
  // Results of attention over packed queries, or null: rows of q that are in no sequence, or that
  // are beyond seqlen_new in theirs, get out = 0 and lse = -inf. Others are left alone.
  void* out;           // [total_q, num_heads_q, head_dim_v] in out_dtype
  void* lse;           // [num_heads_q, total_q], float32 (float64 where out_dtype is)
  DataType out_dtype;  // meaningless where out is null
  int64_t k_stride_batch, v_stride_batch;  // 0 and unused with cu_seqlens_q
  int64_t block_table_stride;
  int64_t out_stride_row, out_stride_head, lse_stride_head;
  int64_t batch;
  int64_t seqlen_new;         // dense: the length; packed: the largest (max_seqlen_q)
  int64_t max_pages_per_seq;  // 1 where block_table is null
  int64_t num_heads_q;        // of out and lse
};

// out = sum_p exp(lse_p - lse) * out_p,  lse = log(sum_p exp(lse_p) + exp(s_aux)).
// A partial lse of +inf counts as -inf: FlashAttention-2's mark of an empty part.
struct MergeParams {
  DataType dtype;  // of the partial outputs and out
  DataType s_aux_dtype;
  const void* const* outs;  // num_parts pointers to [batch, seqlen, num_heads, head_dim]
  const void* const* lses;  // num_parts pointers to [batch, num_heads, seqlen]; float32, or float64
                            // where dtype is
  const void* s_aux;        // [num_heads], may be null
  void* out;                // [batch, seqlen, num_heads, head_dim], contiguous like the parts
  void* lse;                // [batch, num_heads, seqlen], contiguous like the parts
  int64_t num_parts, batch, seqlen, num_heads, head_dim;  // varlen: batch = 1, seqlen = total
};

}  // namespace sink_attention::attention
