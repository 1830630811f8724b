// The backward's softmax: S to P, and dP to dS, in place.
//
//   P  = exp2(S softmax_scale_log2 - lse_log2)
//   dS = P (dP - delta)                 under a softcap times its slope, 1 - tanh^2
//
// All are transposed: the accumulators' rows are keys, their columns rows of the tile of queries.
// lse_log2, delta and window point to shared memory, at the part's first row.
#pragma once

#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/fast_math.h"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm90 {

// Loads the elements of two adjacent columns.
SA_DEVICE void load_pair(const float* elements, int col, float (&pair)[2]) {
  const auto both =
      primitives::load_shared(reinterpret_cast<const primitives::Float2*>(elements + col));
  pair[0] = both.x;
  pair[1] = both.y;
}

// P = exp2(score * softmax_scale_log2 - lse_log2), at most 1. The bound keeps gradients finite
// where logits are so large that lse is rounded by 1 or more in base 2. A NaN passes.
SA_DEVICE float probability(float score, float softmax_scale_log2, float lse_log2) {
  const float exponent = score * softmax_scale_log2 - lse_log2;
  return primitives::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
}

// These convert a part of the rows: kTilesN accumulator tiles, in S and P from tile kFirst on.

// S to P in place.
template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void to_probabilities(Accumulators<1, kTilesS>& s, const float* lse_log2,
                                float softmax_scale_log2, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float lse[2];
    load_pair(lse_log2, 8 * n + accumulator_col(lane, 0), lse);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& element = s.c[0][kFirst + n][reg];
      element = probability(element, softmax_scale_log2, lse[reg % 2]);
    }
  }
}

// dP to dS in place. slopes: P, with a softcap times its slope.
template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void to_gradients(const Accumulators<1, kTilesS>& slopes, Accumulators<1, kTilesN>& dp,
                            const float* delta, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    float row_delta[2];
    load_pair(delta, 8 * n + accumulator_col(lane, 0), row_delta);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& element = dp.c[0][n][reg];
      element = slopes.c[0][kFirst + n][reg] * (element - row_delta[reg % 2]);
    }
  }
}

// With a softcap, of two accumulator tiles from `first` on: S to P in `p`, and to P times the
// softcap's slope in place.
template <int kTilesS>
SA_DEVICE void to_softcap_probabilities(Accumulators<1, kTilesS>& s, int first,
                                        Accumulators<1, 2>& p, const float* lse_log2,
                                        float softmax_scale_log2, float to_tanh, int lane) {
  SA_UNROLL
  for (int n = 0; n < 2; ++n) {
    float lse[2];
    load_pair(lse_log2, 8 * n + accumulator_col(lane, 0), lse);
    SA_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      float& element = s.c[0][first + n][reg];
      const float score = tanh_by_exp2(element * to_tanh);
      const float p_value = probability(score, softmax_scale_log2, lse[reg % 2]);
      p.c[0][n][reg] = p_value;
      element = p_value * (1.0f - score * score);
    }
  }
}

// Zeroes the elements of masked keys, which may be NaN. `key`: the lane's first key, counted within
// the block. Keys before sink_end are sink tokens.
template <int kFirst, int kTilesN, int kTilesS>
SA_DEVICE void zero_masked(Accumulators<1, kTilesS>& elements, const KeyRange* window, int sink_end,
                           int key, int lane) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    SA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const KeyRange window_keys =
          primitives::load_shared(window + 8 * n + accumulator_col(lane, 0) + i);
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = key + 8 * half;
        const bool visible = (window_keys.begin <= at || at < sink_end) && at < window_keys.end;
        float& element = elements.c[0][kFirst + n][2 * half + i];
        element = visible ? element : 0.0f;
      }
    }
  }
}

}  // namespace sink_attention::cuda::sm90
