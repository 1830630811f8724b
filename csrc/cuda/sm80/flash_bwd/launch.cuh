// Starts the backward kernel of one head_dim class.
#pragma once

#include "cuda/sm80/flash_bwd/kernel.cuh"
#include "cuda/sm80/flash_bwd/problem.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

// Bfloat16 or float16.
template <int kHeadDim, int kHeadDimV>
void launch_flash_bwd(FlashBwdKernelProblem problem, Stream stream) {
  using Tiles = FlashBwdTilesOf<kHeadDim, kHeadDimV>;
  const attention::FlashFwdProblem& fwd = problem.bwd.fwd;
  problem.order = bwd_block_order(fwd, Tiles::kBlockN);
  const primitives::Index3 grid{problem.order.num_blocks(), 1, 1};
  if (fwd.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashBwdKernel<attention::BFloat16, Tiles>>(problem, grid, stream);
  } else {
    primitives::launch<FlashBwdKernel<attention::Float16, Tiles>>(problem, grid, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
