#include "cuda/sm90/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_bwd_hdim256(const FlashBwdKernelParams& params, Stream stream) {
  launch_flash_bwd<256, 256>(params, stream);
}

}  // namespace sink_attention::cuda::sm90
