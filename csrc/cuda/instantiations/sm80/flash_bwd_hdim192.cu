#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

template void launch_flash_bwd<FlashBwdTilesOf<192, 192>>(const FlashBwdCall& call);

}  // namespace sink_attention::cuda::sm80
