#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_bwd_hdim32(const FlashBwdKernelProblem& problem, Stream stream) {
  launch_flash_bwd<32, 32>(problem, stream);
}

}  // namespace sink_attention::cuda::sm80
