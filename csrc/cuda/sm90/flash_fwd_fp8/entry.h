// Hopper's forward on float8 q, k and v: dense and varlen, bfloat16 results.
#pragma once

#include "attention/fp8_params.h"
#include "cuda/backend.h"

namespace sink_attention::cuda::sm90 {

// Why a problem is not for these kernels; null if it is. Looks at shapes, strides and pointers'
// alignment, at no memory and not at where the results lie.
inline const char* why_not_flash_fwd_fp8(const attention::FlashFwdFp8Params& params) {
  const attention::FlashFwdParams& fwd = params.fwd;
  const auto is_vectorised = [](const void* base, int64_t cols, int64_t stride_batch,
                                int64_t stride_row, int64_t stride_head) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
           (cols | stride_batch | stride_row | stride_head) % 16 == 0;
  };
  if (fwd.block_table != nullptr || fwd.tree_mask != nullptr) return "it is over a paged cache";
  if (!is_vectorised(fwd.q, fwd.head_dim, fwd.q_stride_batch, fwd.q_stride_row,
                     fwd.q_stride_head) ||
      !is_vectorised(fwd.k, fwd.head_dim, fwd.k_stride_batch, fwd.k_stride_row,
                     fwd.k_stride_head) ||
      !is_vectorised(fwd.v, fwd.head_dim_v, fwd.v_stride_batch, fwd.v_stride_row,
                     fwd.v_stride_head)) {
    return "rows of q, k or v are not in aligned parts of 16 bytes";
  }
  return nullptr;
}

// out and lse of each row that a sequence has. Only for problems that are taken, with batch,
// seqlen_q and num_heads_q above 0 (seqlen_k may be 0) and device.arch == 90. Throws
// std::runtime_error where the launch fails.
void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Device& device, Stream stream);

// One for each head-dim bucket; hdim*.cu hold one each.
void flash_fwd_fp8_hdim64(const attention::FlashFwdFp8Params& params, int num_sms, Stream stream);
void flash_fwd_fp8_hdim128(const attention::FlashFwdFp8Params& params, int num_sms, Stream stream);
void flash_fwd_fp8_hdim256(const attention::FlashFwdFp8Params& params, int num_sms, Stream stream);

}  // namespace sink_attention::cuda::sm90
