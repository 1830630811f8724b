#include "cuda/sm90/flash_fwd_fp8/launch.cuh"

namespace sink_attention::cuda::sm90 {

template void launch_flash_fwd_fp8<64>(const FlashFwdFp8Call& call);

}  // namespace sink_attention::cuda::sm90
