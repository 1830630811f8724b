#include "cuda/sm80/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

template void launch_flash_fwd<Prefill<192, 192>>(const FlashFwdCall& call);
template void launch_flash_fwd<Decode<192, 192>>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::sm80
