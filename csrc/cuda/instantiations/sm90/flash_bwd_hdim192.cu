#include "cuda/sm90/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_bwd_hdim192(const FlashBwdKernelParams& params, Stream stream) {
  launch_flash_bwd<192, 192>(params, stream);
}

}  // namespace sink_attention::cuda::sm90
