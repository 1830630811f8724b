#include "cuda/sm90/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

template void launch_flash_bwd<96, 96>(const FlashBwdCall& call);

}  // namespace sink_attention::cuda::sm90
