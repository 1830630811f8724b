// Hopper's forward: all rows through prefill tiles, whatever the lengths; dense, varlen and paged.
//
// Which problems it takes follows from types, head_dim and layout alone, never from lengths, batch,
// windows or num_splits: a row's result is bitwise the same alone, in a batch, in chunks and over a
// cache, so all of these calls must come here or none.
#pragma once

#include "attention/params.h"
#include "cuda/backend.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda::sm90 {

// Why a problem is not for these kernels; null if it is. Looks at shapes, strides and pointers'
// alignment, at no memory.
inline const char* why_not_flash_fwd(const attention::FlashFwdParams& params) {
  using attention::DataType;
  const int64_t larger = params.head_dim > params.head_dim_v ? params.head_dim : params.head_dim_v;
  if (params.dtype != DataType::kBFloat16 && params.dtype != DataType::kFloat16) {
    return "q is neither bfloat16 nor float16";
  }
  if (params.kv_dtype != params.dtype) return "k and v are not of q's dtype";
  if (larger <= 32) return "head_dim and head_dim_v are at most 32";
  if (params.tree_mask != nullptr) return "there is a tree mask";
  const bool is_vectorised =
      rows_are_vectorised(params.q, params.head_dim, params.q_stride_batch, params.q_stride_row,
                          params.q_stride_head) &&
      rows_are_vectorised(params.k, params.head_dim, params.k_stride_batch, params.k_stride_row,
                          params.k_stride_head) &&
      rows_are_vectorised(params.v, params.head_dim_v, params.v_stride_batch, params.v_stride_row,
                          params.v_stride_head) &&
      rows_are_vectorised(params.out, params.head_dim_v, params.out_stride_batch,
                          params.out_stride_row, params.out_stride_head);
  if (!is_vectorised) return "rows of q, k, v or out are not in aligned parts of 16 bytes";
  return nullptr;
}

// Throws std::runtime_error where one launch cannot take a problem that is taken.
void check_flash_fwd(const attention::FlashFwdParams& params);

// out and lse of each row that a sequence has, sink included: nothing is left to be merged, and
// num_splits is not looked at. Only for problems that are taken, with batch, seqlen_q and
// num_heads_q above 0 (seqlen_k may be 0) and device.arch == 90. Throws std::runtime_error where
// the launch fails.
void flash_fwd(const attention::FlashFwdParams& params, const Device& device, Stream stream);

}  // namespace sink_attention::cuda::sm90
