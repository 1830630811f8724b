#include "cuda/simt/flash_fwd/launch.cuh"

namespace sink_attention::cuda::simt {

template void launch_flash_fwd<FlashFwdTiles<float, 64>>(const FlashFwdCall& call);
template void launch_flash_fwd<FlashFwdTiles<double, 64>>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::simt
