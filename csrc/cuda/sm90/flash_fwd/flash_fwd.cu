// The forward's entry: which head_dim class.
#include <algorithm>

#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/sm90/flash_fwd/problem.h"

namespace sink_attention::cuda::sm90 {

void flash_fwd(const attention::FlashFwdProblem& problem, const Device& device, Stream stream) {
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 64) {
    flash_fwd_hdim64(problem, device.num_sms, stream);
  } else if (larger <= 96) {
    flash_fwd_hdim96(problem, device.num_sms, stream);
  } else if (larger <= 128) {
    flash_fwd_hdim128(problem, device.num_sms, stream);
  } else if (dim <= 192 && dim_v <= 128) {
    flash_fwd_hdim192_128(problem, device.num_sms, stream);
  } else if (larger <= 192) {
    flash_fwd_hdim192(problem, device.num_sms, stream);
  } else {
    flash_fwd_hdim256(problem, device.num_sms, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
