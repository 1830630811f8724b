#include "cuda/sm90/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_hdim64(const attention::FlashFwdProblem& problem, int num_sms, Stream stream) {
  launch_flash_fwd<64, 64>(problem, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
