// Scores and their gradients into P and dS: P in place and then dS, so that products can run beside
// either, or both at once where they would not fit into registers, or dS takes the scores too.
//
//   P  = exp2(S to_log2 - lse_log2)
//   dS = P (dP - delta)                 times 1 - tanh^2 under a softcap
//
// All are transposed: the accumulators' rows are keys, their columns rows of the tile of queries.
// lse_log2, delta and window are shared memory's, of the accumulators' first column on.
#pragma once

#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "cuda/tile/soften.cuh"
#include "primitives/fast_math.h"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm90 {

// Two neighbouring columns' numbers.
SA_DEVICE void load_pair(const float* numbers, int col, float (&pair)[2]) {
  const auto both =
      primitives::load_shared(reinterpret_cast<const primitives::Float2*>(numbers + col));
  pair[0] = both.x;
  pair[1] = both.y;
}

// No weight exceeds 1. Where logits are so large that lse's rounding is a power of two or more,
// this keeps the gradients finite; a NaN passes.
SA_DEVICE float weight_of(float score, float to_log2, float lse_log2) {
  const float exponent = score * to_log2 - lse_log2;
  return primitives::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
}

template <int kTilesN>
SA_DEVICE void to_weights(Accumulators<1, kTilesN>& s, const float* lse_log2, float to_log2,
                          int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float lse[2];
    load_pair(lse_log2, 8 * n + accumulator_col(lane, 0), lse);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      s.c[0][n][reg] = weight_of(s.c[0][n][reg], to_log2, lse[reg % 2]);
    }
  }
}

template <int kTilesN>
SA_DEVICE void to_gradients(const Accumulators<1, kTilesN>& weights, Accumulators<1, kTilesN>& dp,
                            const float* delta, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float row_delta[2];
    load_pair(delta, 8 * n + accumulator_col(lane, 0), row_delta);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      dp.c[0][n][reg] = weights.c[0][n][reg] * (dp.c[0][n][reg] - row_delta[reg % 2]);
    }
  }
}

SA_DEVICE bool is_seen(const KeyRange& window, int sink_end, int key) {
  return (window.begin <= key || key < sink_end) && key < window.end;
}

// Makes the numbers of keys that a row does not see 0, whatever they are. The lane's first key is
// the block's `key`; those before sink_end are sink tokens.
template <int kTilesN>
SA_DEVICE void hide(Accumulators<1, kTilesN>& numbers, const KeyRange* window, int sink_end,
                    int key, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    SA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const KeyRange seen = primitives::load_shared(window + 8 * n + accumulator_col(lane, 0) + i);
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const bool visible = is_seen(seen, sink_end, key + 8 * half);
        float& number = numbers.c[0][n][2 * half + i];
        number = visible ? number : 0.0f;
      }
    }
  }
}

// Both at once, and packed: P^T and dS^T as operands A, for which a number of each is gone. Numbers
// of keys that a row does not see (hide) are 0 where kMasked.
template <bool kMasked, bool kCapped, class Element, int kTilesN>
SA_DEVICE void to_operands_of_both(const Accumulators<1, kTilesN>& s,
                                   const Accumulators<1, kTilesN>& dp, const float* lse_log2,
                                   const float* delta, float to_log2, float to_tanh,
                                   const KeyRange* window, int sink_end, int key, int lane,
                                   OperandsA<1, kTilesN / 2>& p, OperandsA<1, kTilesN / 2>& ds) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    const int col = 8 * n + accumulator_col(lane, 0);
    float lse[2];
    float row_delta[2];
    load_pair(lse_log2, col, lse);
    load_pair(delta, col, row_delta);
    KeyRange seen[2];
    if constexpr (kMasked) {
      seen[0] = primitives::load_shared(window + col);
      seen[1] = primitives::load_shared(window + col + 1);
    }
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      float weight[2];
      float gradient[2];
      SA_UNROLL
      for (int i = 0; i < 2; ++i) {
        float score = s.c[0][n][2 * half + i];
        if constexpr (kCapped) score = tanh_by_exp2(score * to_tanh);
        weight[i] = weight_of(score, to_log2, lse[i]);
        gradient[i] = weight[i] * (dp.c[0][n][2 * half + i] - row_delta[i]);
        if constexpr (kCapped) gradient[i] *= 1.0f - score * score;
        if constexpr (kMasked) {
          const bool visible = is_seen(seen[i], sink_end, key + 8 * half);
          weight[i] = visible ? weight[i] : 0.0f;
          gradient[i] = visible ? gradient[i] : 0.0f;
        }
      }
      p.pair(0, n, half) = primitives::pack<Element>(weight[0], weight[1]);
      ds.pair(0, n, half) = primitives::pack<Element>(gradient[0], gradient[1]);
    }
  }
}

}  // namespace sink_attention::cuda::sm90
