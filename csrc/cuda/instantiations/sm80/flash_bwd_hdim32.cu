#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

template void launch_flash_bwd<FlashBwdTilesOf<32, 32>>(const FlashBwdCall& call);

}  // namespace sink_attention::cuda::sm80
