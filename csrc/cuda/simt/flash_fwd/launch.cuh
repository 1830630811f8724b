// Starts a forward kernel in float32 or float64.
#pragma once

#include "cuda/simt/entry.h"
#include "cuda/simt/flash_fwd/kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::simt {

template <class Tiles>
void launch_flash_fwd(const FlashFwdCall& call) {
  const int64_t tiles = divide_up(call.plan.shape.pack_gqa_rows(), Tiles::kBlockM);
  primitives::launch<FlashFwdKernel<Tiles>>({call.params, static_cast<int>(tiles)},
                                            {blocks_of(call.plan.shape, tiles), 1, 1}, call.stream);
}

}  // namespace sink_attention::cuda::simt
