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
  problem.num_key_blocks = static_cast<int>((fwd.seqlen_k + Tiles::kBlockN - 1) / Tiles::kBlockN);
  // Blocks of keys of one sequence follow each other in the first dimension: they start in their
  // order, which waiting for turns relies on.
  const primitives::Index3 grid{static_cast<int>(problem.num_key_blocks * fwd.batch),
                                static_cast<int>(fwd.num_heads_kv), 1};
  if (fwd.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashBwdKernel<attention::BFloat16, Tiles>>(problem, grid, stream);
  } else {
    primitives::launch<FlashBwdKernel<attention::Float16, Tiles>>(problem, grid, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
