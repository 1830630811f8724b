// Hopper's backward: dense and varlen.
#pragma once

#include "attention/params.h"
#include "cuda/backend.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda::sm90 {

// Why a problem is not for these kernels; null if it is. Looks at shapes, strides and pointers'
// alignment, at no memory. A forward of either family may have come before: all that counts of it
// is out and lse.
inline const char* why_not_flash_bwd(const attention::FlashBwdParams& params) {
  using attention::DataType;
  const attention::FlashFwdParams& fwd = params.fwd;
  const int64_t larger = fwd.head_dim > fwd.head_dim_v ? fwd.head_dim : fwd.head_dim_v;
  if (fwd.dtype != DataType::kBFloat16 && fwd.dtype != DataType::kFloat16) {
    return "q is neither bfloat16 nor float16";
  }
  if (larger <= 32) return "head_dim and head_dim_v are at most 32";
  const bool is_vectorised =
      rows_are_vectorised(fwd.q, fwd.head_dim, fwd.q_stride_batch, fwd.q_stride_row,
                          fwd.q_stride_head) &&
      rows_are_vectorised(fwd.k, fwd.head_dim, fwd.k_stride_batch, fwd.k_stride_row,
                          fwd.k_stride_head) &&
      rows_are_vectorised(fwd.v, fwd.head_dim_v, fwd.v_stride_batch, fwd.v_stride_row,
                          fwd.v_stride_head) &&
      rows_are_vectorised(params.dout, fwd.head_dim_v, params.dout_stride_batch,
                          params.dout_stride_row, params.dout_stride_head) &&
      rows_are_vectorised(params.dk, fwd.head_dim, params.dk_stride_batch, params.dk_stride_row,
                          params.dk_stride_head) &&
      rows_are_vectorised(params.dv, fwd.head_dim_v, params.dv_stride_batch, params.dv_stride_row,
                          params.dv_stride_head);
  if (!is_vectorised) return "rows of q, k, v, dout, dk or dv are not in aligned parts of 16 bytes";
  return nullptr;
}

// What flash_bwd needs for the same problem.
int64_t flash_bwd_workspace_bytes(const attention::FlashBwdParams& params);

// dq, dk, dv and ds_aux, as cuda::flash_bwd leaves them: common/bwd_rows runs from here, before and
// after. Only for problems that are taken, with num_heads_q above 0 (batch and lengths may be 0,
// and all gradients must then be right too) and device.arch == 90; `workspace` as backend.h says:
// aligned to 256 bytes, contents not set. Throws std::runtime_error where a launch fails.
void flash_bwd(const attention::FlashBwdParams& params, const Device& device, void* workspace,
               Stream stream);

}  // namespace sink_attention::cuda::sm90
