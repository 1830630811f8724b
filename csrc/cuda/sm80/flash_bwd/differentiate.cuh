// Scores and their gradients into P and dS.
//
//   P  = exp2(S softmax_scale_log2 - lse_log2)
//   dS = P (dP - delta)                 times 1 - tanh^2 under a softcap
#pragma once

#include "cuda/sm80/flash_bwd/params.h"
#include "cuda/sm80/flash_bwd/storage.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm80 {

// P^T and dS^T as operands, from a warp's S^T and dP^T: keys of the block from warp_key on, rows of
// the tile from warp_row on. A thread has two neighbouring rows in each accumulator, and two keys.
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
        float weight[2];
        float gradient[2];
        SA_UNROLL
        for (int i = 0; i < 2; ++i) {
          float score = s.c[m][n][2 * half + i];
          if constexpr (kSoftcap) score = tanh_by_exp2(score * params.to_tanh);
          // No weight exceeds 1. Where logits are so large that lse's rounding is a power of two
          // or more, this keeps the gradients finite; a NaN passes.
          const float exponent = score * params.softmax_scale_log2 - (i == 0 ? lse.x : lse.y);
          weight[i] = primitives::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
          gradient[i] = weight[i] * (dp.c[m][n][2 * half + i] - (i == 0 ? delta.x : delta.y));
          if constexpr (kSoftcap) gradient[i] *= 1.0f - score * score;
          if constexpr (kMasked) {
            const bool visible = (window[i].begin <= key || key < sink_end) && key < window[i].end;
            weight[i] = visible ? weight[i] : 0.0f;
            gradient[i] = visible ? gradient[i] : 0.0f;
          }
        }
        p.pair(m, n, half) = primitives::pack<typename Storage::Element>(weight[0], weight[1]);
        ds.pair(m, n, half) = primitives::pack<typename Storage::Element>(gradient[0], gradient[1]);
      }
    }
  }
}

}  // namespace sink_attention::cuda::sm80
