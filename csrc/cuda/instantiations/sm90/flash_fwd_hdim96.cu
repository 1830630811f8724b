#include "cuda/sm90/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

template void launch_flash_fwd<96, 96>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::sm90
