#include "cuda/sm80/flash_bwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_bwd_hdim128(const FlashBwdKernelProblem& problem, Stream stream) {
  launch_flash_bwd<128, 128>(problem, stream);
}

}  // namespace sink_attention::cuda::sm80
