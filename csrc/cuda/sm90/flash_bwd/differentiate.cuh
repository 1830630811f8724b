// Scores and their gradients into P and dS, in place.
//
//   P  = exp2(S softmax_scale_log2 - lse_log2)
//   dS = P (dP - delta)                 times 1 - tanh^2 under a softcap: a slope of P for each
//
// All are transposed: the accumulators' rows are keys, their columns rows of the tile of queries.
// lse_log2, delta and window are shared memory's, from the part's first row on.
#pragma once

#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/online_softmax.cuh"
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
SA_DEVICE float weight_of(float score, float softmax_scale_log2, float lse_log2) {
  const float exponent = score * softmax_scale_log2 - lse_log2;
  return primitives::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
}

// A part of the rows at a time: kTilesN accumulators, of S and P from kFirst on.

template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void to_weights(Accumulators<1, kTilesS>& s, const float* lse_log2,
                          float softmax_scale_log2, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float lse[2];
    load_pair(lse_log2, 8 * n + accumulator_col(lane, 0), lse);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& number = s.c[0][kFirst + n][reg];
      number = weight_of(number, softmax_scale_log2, lse[reg % 2]);
    }
  }
}

template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void to_gradients(const Accumulators<1, kTilesS>& slopes, Accumulators<1, kTilesN>& dp,
                            const float* delta, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float row_delta[2];
    load_pair(delta, 8 * n + accumulator_col(lane, 0), row_delta);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& number = dp.c[0][n][reg];
      number = slopes.c[0][kFirst + n][reg] * (number - row_delta[reg % 2]);
    }
  }
}

// Under a softcap, two accumulators from `first` on: P, and in place of S the slope.
template <int kTilesS>
SA_DEVICE void to_softcap_probabilities(Accumulators<1, kTilesS>& s, int first,
                                        Accumulators<1, 2>& weights, const float* lse_log2,
                                        float softmax_scale_log2, float to_tanh, int lane) {
  SA_UNROLL
  for (int n = 0; n < 2; ++n) {
    float lse[2];
    load_pair(lse_log2, 8 * n + accumulator_col(lane, 0), lse);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& number = s.c[0][first + n][reg];
      const float score = tanh_by_exp2(number * to_tanh);
      const float weight = weight_of(score, softmax_scale_log2, lse[reg % 2]);
      weights.c[0][n][reg] = weight;
      number = weight * (1.0f - score * score);
    }
  }
}

// Makes the numbers of keys that a row does not see 0, whatever they are. The lane's first key is
// the block's `key`; those before sink_end are sink tokens.
template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void hide(Accumulators<1, kTilesS>& numbers, const KeyRange* window, int sink_end,
                    int key, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    SA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const KeyRange seen = primitives::load_shared(window + 8 * n + accumulator_col(lane, 0) + i);
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = key + 8 * half;
        const bool visible = (seen.begin <= at || at < sink_end) && at < seen.end;
        float& number = numbers.c[0][kFirst + n][2 * half + i];
        number = visible ? number : 0.0f;
      }
    }
  }
}

}  // namespace sink_attention::cuda::sm90
