// Chooses a forward kernel for a problem and starts it.
#pragma once

#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

template <class Kernel, class Tiles>
void launch_tiles(FlashFwdKernelParams kernel_params, Stream stream) {
  kernel_params.order = fwd_block_order(kernel_params.attn, Tiles::kBlockM);
  const primitives::Index3 grid{kernel_params.order.num_blocks(), kernel_params.num_splits, 1};
  primitives::launch<Kernel>(kernel_params, grid, stream);
}

// One head-dim bucket: bfloat16 or float16, tiles for prefill or decode.
template <int kHeadDim, int kHeadDimV>
void launch_flash_fwd(const FlashFwdKernelParams& kernel_params, bool decode, Stream stream) {
  using attention::BFloat16;
  using attention::Float16;
  using PrefillTiles = Prefill<kHeadDim, kHeadDimV>;
  using DecodeTiles = Decode<kHeadDim, kHeadDimV>;
  if (kernel_params.attn.dtype == attention::DataType::kBFloat16) {
    decode
        ? launch_tiles<FlashFwdKernel<BFloat16, DecodeTiles>, DecodeTiles>(kernel_params, stream)
        : launch_tiles<FlashFwdKernel<BFloat16, PrefillTiles>, PrefillTiles>(kernel_params, stream);
  } else {
    decode
        ? launch_tiles<FlashFwdKernel<Float16, DecodeTiles>, DecodeTiles>(kernel_params, stream)
        : launch_tiles<FlashFwdKernel<Float16, PrefillTiles>, PrefillTiles>(kernel_params, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
