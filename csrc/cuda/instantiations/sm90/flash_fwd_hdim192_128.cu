#include "cuda/sm90/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_hdim192_128(const attention::FlashFwdParams& params, int num_sms, Stream stream) {
  launch_flash_fwd<192, 128>(params, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
