#include "cuda/sm90/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_hdim192_128(const attention::FlashFwdProblem& problem, int num_sms, Stream stream) {
  launch_flash_fwd<192, 128>(problem, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
