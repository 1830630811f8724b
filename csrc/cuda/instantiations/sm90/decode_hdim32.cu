#include "cuda/sm90/decode/launch.cuh"

namespace sink_attention::cuda::sm90 {

template void launch_decode<32, 32>(const FlashFwdCall& call);

}  // namespace sink_attention::cuda::sm90
