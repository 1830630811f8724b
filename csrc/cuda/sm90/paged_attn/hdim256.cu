#include "cuda/sm90/paged_attn/launch.cuh"

namespace sink_attention::cuda::sm90 {

void decode_hdim256(const DecodeKernelProblem& kernel_problem, Stream stream) {
  launch_decode<256, 256>(kernel_problem, stream);
}

}  // namespace sink_attention::cuda::sm90
