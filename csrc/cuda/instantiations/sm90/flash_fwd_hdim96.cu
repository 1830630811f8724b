#include "cuda/sm90/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_hdim96(const attention::FlashFwdParams& params, int num_sms, Stream stream) {
  launch_flash_fwd<96, 96>(params, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
