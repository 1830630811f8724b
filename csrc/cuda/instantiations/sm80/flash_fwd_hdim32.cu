#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/launch.cuh"

namespace sink_attention::cuda::sm80 {

void flash_fwd_hdim32(const FlashFwdKernelParams& params, bool decode, Stream stream) {
  launch_flash_fwd<32, 32>(params, decode, stream);
}

}  // namespace sink_attention::cuda::sm80
