// O += P V of a warpgroup in the wgmma accumulators, for bfloat16 and float16. Float8 has its own
// in flash_fwd_fp8/output.cuh.
#pragma once

#include "cuda/sm90/operands.cuh"

namespace sink_attention::cuda::sm90 {

template <class Tiles, class VTile>
struct FlashFwdOutput {
  Accumulators<1, Tiles::kHeadDimV / 8> sum;

  // Starts O += P V as one wgmma group, after the kOverlappedGroups groups that start_overlapped()
  // commits.
  template <int kOverlappedGroups, int kSteps, class Start>
  SA_DEVICE void start(const uint32_t (&p)[kSteps][4], const VTile& v,
                       const Start& start_overlapped) {
    primitives::warpgroup_fence_operand(sum.c[0]);
    primitives::warpgroup_arrive();
    start_overlapped();
    start_ab(sum, p, v, 0, 0, true);
    primitives::wgmma_commit();
  }
  // Call after wgmma_wait<0>.
  SA_DEVICE void finish() { primitives::warpgroup_fence_operand(sum.c[0]); }
};

}  // namespace sink_attention::cuda::sm90
