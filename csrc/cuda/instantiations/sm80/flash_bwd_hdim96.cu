#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_bwd_hdim96(const FlashBwdKernelParams& params, Stream stream) {
  launch_flash_bwd<96, 96>(params, stream);
}

}  // namespace sink_attention::cuda::sm80
