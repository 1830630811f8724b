// Starts a forward kernel, and joins the parts that it leaves where the keys are divided.
#pragma once

#include "cuda/kernels/combine.h"
#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

inline FlashFwdKernelParams kernel_params_of(const FlashFwdCall& call) {
  const attention::FlashFwdParams& params = call.params;
  FlashFwdKernelParams kernel_params{};
  kernel_params.attn = params;
  kernel_params.scale = score_scale(params);
  kernel_params.q_is_vectorised = rows_are_vectorised(
      params.q, params.head_dim, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
  kernel_params.k_is_vectorised = rows_are_vectorised(
      params.k, params.head_dim, params.k_stride_batch, params.k_stride_row, params.k_stride_head);
  kernel_params.v_is_vectorised =
      rows_are_vectorised(params.v, params.head_dim_v, params.v_stride_batch, params.v_stride_row,
                          params.v_stride_head);
  kernel_params.out_is_vectorised =
      rows_are_vectorised(params.out, params.head_dim_v, params.out_stride_batch,
                          params.out_stride_row, params.out_stride_head);
  kernel_params.num_splits = call.plan.num_splits;
  const Partials partials = partials_in(call.workspace, call.plan.shape, call.plan.num_splits);
  kernel_params.partial_state = partials.state;
  kernel_params.partial_out = partials.out;
  return kernel_params;
}

// Bfloat16 or float16.
template <class Tiles>
void launch_flash_fwd(const FlashFwdCall& call) {
  FlashFwdKernelParams kernel_params = kernel_params_of(call);
  kernel_params.order = fwd_block_order(call.params, Tiles::kBlockM);
  const primitives::Index3 grid{kernel_params.order.num_blocks(), kernel_params.num_splits, 1};
  if (call.params.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashFwdKernel<attention::BFloat16, Tiles>>(kernel_params, grid,
                                                                   call.stream);
  } else {
    primitives::launch<FlashFwdKernel<attention::Float16, Tiles>>(kernel_params, grid, call.stream);
  }
  if (kernel_params.num_splits > 1) {
    combine(call.params, call.plan.shape, kernel_params.num_splits,
            {kernel_params.partial_state, kernel_params.partial_out}, call.stream);
  }
}

}  // namespace sink_attention::cuda::sm80
