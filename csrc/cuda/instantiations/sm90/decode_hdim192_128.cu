#include "cuda/sm90/decode/launch.cuh"

namespace sink_attention::cuda::sm90 {

void decode_hdim192_128(const DecodeKernelParams& kernel_params, Stream stream) {
  launch_decode<192, 128>(kernel_params, stream);
}

}  // namespace sink_attention::cuda::sm90
