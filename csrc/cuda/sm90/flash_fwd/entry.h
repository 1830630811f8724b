// Hopper's forward: all rows through prefill tiles, whatever the lengths; dense, varlen and paged.
//
// Which problems it takes follows from types, head_dim and layout alone, never from lengths, batch,
// windows or num_splits: a row's result is bitwise the same alone, in a batch, in chunks and over a
// cache, so all of these calls must come here or none.
#pragma once

#include "attention/problem.h"
#include "cuda/backend.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda::sm90 {

// Why a problem is not for these kernels; null if it is. Looks at shapes, strides and pointers'
// alignment, at no memory.
inline const char* why_not_flash_fwd(const attention::FlashFwdProblem& problem) {
  using attention::DataType;
  const int64_t larger =
      problem.head_dim > problem.head_dim_v ? problem.head_dim : problem.head_dim_v;
  if (problem.dtype != DataType::kBFloat16 && problem.dtype != DataType::kFloat16) {
    return "q is neither bfloat16 nor float16";
  }
  if (problem.kv_dtype != problem.dtype) return "k and v are not of q's dtype";
  if (larger <= 32) return "head_dim and head_dim_v are at most 32";
  if (problem.tree_mask != nullptr) return "there is a tree mask";
  const bool in_chunks = rows_are_chunks(problem.q, problem.head_dim, problem.q_stride_batch,
                                         problem.q_stride_row, problem.q_stride_head) &&
                         rows_are_chunks(problem.k, problem.head_dim, problem.k_stride_batch,
                                         problem.k_stride_row, problem.k_stride_head) &&
                         rows_are_chunks(problem.v, problem.head_dim_v, problem.v_stride_batch,
                                         problem.v_stride_row, problem.v_stride_head) &&
                         rows_are_chunks(problem.out, problem.head_dim_v, problem.out_stride_batch,
                                         problem.out_stride_row, problem.out_stride_head);
  if (!in_chunks) return "rows of q, k, v or out are not in aligned parts of 16 bytes";
  return nullptr;
}

// Throws std::runtime_error where one launch cannot take a problem that is taken.
void check_flash_fwd(const attention::FlashFwdProblem& problem);

// out and lse of each row that a sequence has, sink included: nothing is left to be merged, and
// num_splits is not looked at. Only for problems that are taken, with batch, seqlen_q and
// num_heads_q above 0 (seqlen_k may be 0) and device.arch == 90. Throws std::runtime_error where
// the launch fails.
void flash_fwd(const attention::FlashFwdProblem& problem, const Device& device, Stream stream);

}  // namespace sink_attention::cuda::sm90
