#include "cuda/sm90/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_bwd_hdim64(const FlashBwdKernelParams& params, Stream stream) {
  launch_flash_bwd<64, 64>(params, stream);
}

}  // namespace sink_attention::cuda::sm90
