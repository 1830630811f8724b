// Starts the float8 forward kernel of one head-dim bucket.
#pragma once

#include "cuda/sm90/flash_fwd/launch.cuh"
#include "cuda/sm90/flash_fwd_fp8/config.h"
#include "cuda/sm90/flash_fwd_fp8/entry.h"
#include "cuda/sm90/flash_fwd_fp8/transposer.cuh"

namespace sink_attention::cuda::sm90 {

// The problem as copies see it, whose rows of q, k and v are pairs of numbers: 16 bits each, half
// as many.
inline attention::FlashFwdParams in_pairs(attention::FlashFwdParams params) {
  params.dtype = params.kv_dtype = attention::DataType::kBFloat16;  // any of 16 bits
  for (int64_t* count :
       {&params.head_dim, &params.head_dim_v, &params.q_stride_batch, &params.q_stride_row,
        &params.q_stride_head, &params.k_stride_batch, &params.k_stride_row, &params.k_stride_head,
        &params.v_stride_batch, &params.v_stride_row, &params.v_stride_head}) {
    *count /= 2;
  }
  return params;
}

template <int kHeadDim>
void launch_flash_fwd_fp8(const FlashFwdFp8Call& call) {
  FlashFwdKernelParams kernel_params{};
  kernel_params.attn = in_pairs(call.params.fwd);
  kernel_params.out_cols = static_cast<int>(call.params.fwd.head_dim_v);
  kernel_params.q_descale = call.params.q_descale;
  kernel_params.k_descale = call.params.k_descale;
  kernel_params.v_descale = call.params.v_descale;
  launch_tiles<attention::Float8E4M3, FlashFwdFloat8TilesOf<kHeadDim>>(
      kernel_params, call.plan.num_sms, call.stream);
}

}  // namespace sink_attention::cuda::sm90
