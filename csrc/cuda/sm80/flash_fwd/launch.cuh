// Chooses a forward kernel for a problem and starts it.
#pragma once

#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

template <class Kernel, class Tiles>
void launch_tiles(FlashFwdKernelProblem kernel_problem, Stream stream) {
  kernel_problem.order = fwd_block_order(kernel_problem.problem, Tiles::kBlockM);
  const primitives::Index3 grid{kernel_problem.order.num_blocks(), kernel_problem.num_splits, 1};
  primitives::launch<Kernel>(kernel_problem, grid, stream);
}

// One head_dim class: bfloat16 or float16, tiles for prefill or decode.
template <int kHeadDim, int kHeadDimV>
void launch_flash_fwd(const FlashFwdKernelProblem& kernel_problem, bool decode, Stream stream) {
  using attention::BFloat16;
  using attention::Float16;
  using PrefillTiles = Prefill<kHeadDim, kHeadDimV>;
  using DecodeTiles = Decode<kHeadDim, kHeadDimV>;
  if (kernel_problem.problem.dtype == attention::DataType::kBFloat16) {
    decode
        ? launch_tiles<FlashFwdKernel<BFloat16, DecodeTiles>, DecodeTiles>(kernel_problem, stream)
        : launch_tiles<FlashFwdKernel<BFloat16, PrefillTiles>, PrefillTiles>(kernel_problem,
                                                                             stream);
  } else {
    decode
        ? launch_tiles<FlashFwdKernel<Float16, DecodeTiles>, DecodeTiles>(kernel_problem, stream)
        : launch_tiles<FlashFwdKernel<Float16, PrefillTiles>, PrefillTiles>(kernel_problem, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
