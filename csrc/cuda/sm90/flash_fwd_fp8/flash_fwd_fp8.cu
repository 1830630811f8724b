// The float8 forward's entry: which head_dim class.
#include <algorithm>

#include "cuda/sm90/flash_fwd_fp8/entry.h"

namespace sink_attention::cuda::sm90 {

void flash_fwd_float8(const attention::FlashFwdFloat8Problem& problem, const Device& device,
                      Stream stream) {
  const int64_t larger = std::max(problem.fwd.head_dim, problem.fwd.head_dim_v);
  if (larger <= 64) {
    flash_fwd_float8_hdim64(problem, device.num_sms, stream);
  } else if (larger <= 128) {
    flash_fwd_float8_hdim128(problem, device.num_sms, stream);
  } else {
    flash_fwd_float8_hdim256(problem, device.num_sms, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
