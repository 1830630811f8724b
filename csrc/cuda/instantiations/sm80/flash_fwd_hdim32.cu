#include "cuda/sm80/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

template void launch_flash_fwd<Prefill<32, 32>>(const FlashFwdCall& call);
template void launch_flash_fwd<Decode<32, 32>>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::sm80
