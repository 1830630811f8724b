#include "cuda/sm90/decode/launch.cuh"

namespace sink_attention::cuda::sm90 {

void decode_hdim128(const DecodeKernelParams& kernel_params, Stream stream) {
  launch_decode<128, 128>(kernel_params, stream);
}

}  // namespace sink_attention::cuda::sm90
