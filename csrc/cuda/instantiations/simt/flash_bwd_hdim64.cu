#include "cuda/simt/flash_bwd/launch.cuh"

namespace sink_attention::cuda::simt {

template void launch_flash_bwd<FlashBwdTiles<float, 64>>(const FlashBwdCall& call);
template void launch_flash_bwd<FlashBwdTiles<double, 64>>(const FlashBwdCall& call);

}  // namespace sink_attention::cuda::simt
