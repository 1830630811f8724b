// The float8 forward's entry: which head-dim bucket.
#include <algorithm>

#include "cuda/sm90/flash_fwd_fp8/entry.h"

namespace sink_attention::cuda::sm90 {

void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Device& device,
                   Stream stream) {
  const int64_t larger = std::max(params.fwd.head_dim, params.fwd.head_dim_v);
  if (larger <= 64) {
    flash_fwd_fp8_hdim64(params, device.num_sms, stream);
  } else if (larger <= 128) {
    flash_fwd_fp8_hdim128(params, device.num_sms, stream);
  } else {
    flash_fwd_fp8_hdim256(params, device.num_sms, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
