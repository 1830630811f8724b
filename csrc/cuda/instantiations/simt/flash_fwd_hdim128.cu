#include "cuda/simt/flash_fwd/launch.cuh"

namespace sink_attention::cuda::simt {

template void launch_flash_fwd<FlashFwdTiles<float, 128>>(const FlashFwdCall& call);
template void launch_flash_fwd<FlashFwdTiles<double, 128>>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::simt
