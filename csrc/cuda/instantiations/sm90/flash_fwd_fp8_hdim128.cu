#include "cuda/sm90/flash_fwd_fp8/launch.cuh"

namespace sink_attention::cuda::sm90 {

void flash_fwd_fp8_hdim128(const attention::FlashFwdFp8Params& params, int num_sms, Stream stream) {
  launch_flash_fwd_fp8<128>(params, num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
