// Starts the backward kernel of one head-dim bucket.
#pragma once

#include "cuda/sm80/flash_bwd/kernel.cuh"
#include "cuda/sm80/flash_bwd/params.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

// Bfloat16 or float16.
template <int kHeadDim, int kHeadDimV>
void launch_flash_bwd(FlashBwdKernelParams params, Stream stream) {
  using Tiles = FlashBwdTilesOf<kHeadDim, kHeadDimV>;
  const attention::FlashFwdParams& fwd = params.bwd.fwd;
  params.order = bwd_block_order(fwd, Tiles::kBlockN);
  const primitives::Index3 grid{params.order.num_blocks(), 1, 1};
  if (fwd.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashBwdKernel<attention::BFloat16, Tiles>>(params, grid, stream);
  } else {
    primitives::launch<FlashBwdKernel<attention::Float16, Tiles>>(params, grid, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
