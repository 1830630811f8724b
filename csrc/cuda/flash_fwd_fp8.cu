// The float8 forward's entry: whether there are kernels.
#include "cuda/bounded.h"
#include "cuda/family.h"
#include "cuda/sm90/flash_fwd_fp8/entry.h"

namespace sink_attention::cuda {

bool takes_flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Device& device) {
  const char* why_not = why_not_sm90(device);
  if (why_not == nullptr) why_not = sm90::why_not_flash_fwd_fp8(params);
  if (why_not == nullptr) return true;
  must_not_be_forced(device, "float8 forward", why_not);
  return false;
}

void flash_fwd_fp8(const attention::FlashFwdFp8Params& given, [[maybe_unused]] const Device& device,
                   [[maybe_unused]] Stream stream) {
  const attention::FlashFwdParams& fwd = given.fwd;
  if (fwd.batch == 0 || fwd.seqlen_q == 0 || fwd.num_heads_q == 0) return;
  attention::FlashFwdFp8Params params = given;
  params.fwd = bounded(fwd);
  if constexpr (kHasSm90) sm90::flash_fwd_fp8(params, device, stream);
}

}  // namespace sink_attention::cuda
