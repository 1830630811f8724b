// O += P V of a warpgroup, in the tensor cores' own accumulators: that of bfloat16 and float16.
// float8's is in flash_fwd_fp8/output.cuh.
#pragma once

#include "cuda/sm90/operands.cuh"

namespace sink_attention::cuda::sm90 {

template <class Tiles, class VTile>
struct FlashFwdOutput {
  Accumulators<1, Tiles::kHeadDimV / 8> sum;

  // Starts O += P V, in one group, and before it the kGroupsBeside groups that `start_beside` does.
  template <int kGroupsBeside, int kSteps, class Start>
  SA_DEVICE void start(const uint32_t (&p)[kSteps][4], const VTile& v, const Start& start_beside) {
    primitives::warpgroup_fence_operand(sum.c[0]);
    primitives::warpgroup_arrive();
    start_beside();
    start_ab(sum, p, v, 0, 0, true);
    primitives::wgmma_commit();
  }
  // After a wait for all groups.
  SA_DEVICE void finish() { primitives::warpgroup_fence_operand(sum.c[0]); }
};

}  // namespace sink_attention::cuda::sm90
