#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_fwd_hdim192_128(const FlashFwdKernelParams& params, bool decode, Stream stream) {
  launch_flash_fwd<192, 128>(params, decode, stream);
}

}  // namespace sink_attention::cuda::sm80
