// The backward's launches. The rows are in sm80/table.cpp.
#pragma once

#include "cuda/registry.h"
#include "cuda/sm80/flash_bwd/config.h"

namespace sink_attention::cuda::sm80 {

// Dense and varlen; Tiles: a FlashBwdTilesOf. Batch and lengths may be 0: all gradients are then 0.
template <class Tiles>
SA_LAUNCH launch_flash_bwd(const FlashBwdCall& call);

}  // namespace sink_attention::cuda::sm80
