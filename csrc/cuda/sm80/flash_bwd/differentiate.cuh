// From S and dP to P and dS.
//
//   P  = exp2(S softmax_scale_log2 - lse_log2)
//   dS = P (dP - delta)                 times 1 - tanh^2 with softcap
#pragma once

#include "cuda/sm80/flash_bwd/params.h"
#include "cuda/sm80/flash_bwd/storage.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm80 {

// Computes P^T and dS^T, packed as operands A, from a warp's S^T and dP^T. The accumulators begin
// at key warp_key of the block and row warp_row of the tile. In each 16 x 8 fragment a thread has
// two keys and two neighbouring rows.
template <bool kMasked, bool kSoftcap, class Storage, int kTilesM, int kTilesN>
SA_DEVICE void differentiate(const FlashBwdKernelParams& params, const Storage& storage, int stage,
                             int warp_key, int warp_row, int lane,
                             const Accumulators<kTilesM, kTilesN>& s,
                             const Accumulators<kTilesM, kTilesN>& dp,
                             OperandsA<kTilesM, kTilesN / 2>& p,
                             OperandsA<kTilesM, kTilesN / 2>& ds) {
  using primitives::Float2;
  using primitives::load_shared;
  const int sink_end = kMasked ? load_shared(&storage.sink_end) : 0;
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    const int row = warp_row + 8 * n + accumulator_col(lane, 0);
    const auto lse = load_shared(reinterpret_cast<const Float2*>(storage.lse_log2[stage] + row));
    const auto delta = load_shared(reinterpret_cast<const Float2*>(storage.delta[stage] + row));
    KeyRange window[2];
    if constexpr (kMasked) {
      window[0] = load_shared(storage.window[stage] + row);
      window[1] = load_shared(storage.window[stage] + row + 1);
    }
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int key = warp_key + 16 * m + accumulator_row(lane, 2 * half);
        float prob[2];
        float dscore[2];
        SA_UNROLL
        for (int i = 0; i < 2; ++i) {
          float score = s.c[m][n][2 * half + i];
          if constexpr (kSoftcap) score = tanh_by_exp2(score * params.to_tanh);
          const float exponent = score * params.softmax_scale_log2 - (i == 0 ? lse.x : lse.y);
          prob[i] = primitives::exp2_approx(clamp_exponent(exponent));
          dscore[i] = prob[i] * (dp.c[m][n][2 * half + i] - (i == 0 ? delta.x : delta.y));
          if constexpr (kSoftcap) dscore[i] *= 1.0f - score * score;
          if constexpr (kMasked) {
            const bool visible = (window[i].begin <= key || key < sink_end) && key < window[i].end;
            prob[i] = visible ? prob[i] : 0.0f;
            dscore[i] = visible ? dscore[i] : 0.0f;
          }
        }
        p.pair(m, n, half) = primitives::pack<typename Storage::Element>(prob[0], prob[1]);
        ds.pair(m, n, half) = primitives::pack<typename Storage::Element>(dscore[0], dscore[1]);
      }
    }
  }
}

}  // namespace sink_attention::cuda::sm80
