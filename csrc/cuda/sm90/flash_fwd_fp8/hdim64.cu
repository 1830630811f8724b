#include "cuda/sm90/flash_fwd_fp8/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_float8_hdim64(const attention::FlashFwdFloat8Problem& problem, int num_sms,
                             Stream stream) {
  launch_flash_fwd_float8<64>(problem, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
