#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_bwd_hdim192(const FlashBwdKernelParams& params, Stream stream) {
  launch_flash_bwd<192, 192>(params, stream);
}

}  // namespace sink_attention::cuda::sm80
