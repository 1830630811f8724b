#include "cuda/sm90/paged_attn/launch.cuh"

namespace sink_attention::cuda::sm90 {

void decode_hdim96(const DecodeKernelProblem& kernel_problem, Stream stream) {
  launch_decode<96, 96>(kernel_problem, stream);
}

}  // namespace sink_attention::cuda::sm90
