// Starts the backward's kernels of one head-dim bucket.
#pragma once

#include "cuda/device/score_scale.h"
#include "cuda/sm80/flash_bwd/entry.h"
#include "cuda/sm80/flash_bwd/kernel.cuh"
#include "cuda/sm80/flash_bwd/params.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

inline void set_vectorised(const attention::FlashBwdParams& bwd,
                           FlashBwdKernelParams& kernel_params) {
  const attention::FlashFwdParams& fwd = bwd.fwd;
  kernel_params.q_is_vectorised = rows_are_vectorised(fwd.q, fwd.head_dim, fwd.q_stride_batch,
                                                      fwd.q_stride_row, fwd.q_stride_head);
  kernel_params.k_is_vectorised = rows_are_vectorised(fwd.k, fwd.head_dim, fwd.k_stride_batch,
                                                      fwd.k_stride_row, fwd.k_stride_head);
  kernel_params.v_is_vectorised = rows_are_vectorised(fwd.v, fwd.head_dim_v, fwd.v_stride_batch,
                                                      fwd.v_stride_row, fwd.v_stride_head);
  kernel_params.dout_is_vectorised = rows_are_vectorised(
      bwd.dout, fwd.head_dim_v, bwd.dout_stride_batch, bwd.dout_stride_row, bwd.dout_stride_head);
  kernel_params.dk_is_vectorised = rows_are_vectorised(bwd.dk, fwd.head_dim, bwd.dk_stride_batch,
                                                       bwd.dk_stride_row, bwd.dk_stride_head);
  kernel_params.dv_is_vectorised = rows_are_vectorised(bwd.dv, fwd.head_dim_v, bwd.dv_stride_batch,
                                                       bwd.dv_stride_row, bwd.dv_stride_head);
}

// Bfloat16 or float16.
template <class Tiles>
void launch_flash_bwd(const FlashBwdCall& call) {
  const attention::FlashFwdParams& fwd = call.params.fwd;
  FlashBwdKernelParams kernel_params{};
  kernel_params.bwd = call.params;
  lay_out(call.plan.shape, Tiles::kBlockM, Tiles::kBlockM, Tiles::kHeadDim, call.workspace,
          kernel_params.workspace);
  kernel_params.order = bwd_block_order(fwd, Tiles::kBlockN);
  kernel_params.qhead_per_khead = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  set_bwd_score_scale(fwd, kernel_params);
  set_vectorised(call.params, kernel_params);
  const primitives::Index3 grid{kernel_params.order.num_blocks(), 1, 1};
  bwd_preprocess(call.params, kernel_params.workspace, call.stream);
  if (fwd.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashBwdKernel<attention::BFloat16, Tiles>>(kernel_params, grid,
                                                                   call.stream);
  } else {
    primitives::launch<FlashBwdKernel<attention::Float16, Tiles>>(kernel_params, grid, call.stream);
  }
  bwd_postprocess(call.params, kernel_params.workspace, call.stream);
}

}  // namespace sink_attention::cuda::sm80
