// The online softmax on a warp's accumulators: softcap, mask, running maximum, S -> P, running sum.
//
// In each 16-row tile m a thread holds two rows: lane / 4 (half 0) and lane / 4 + 8 (half 1). In
// each of them it holds two columns of every 8-column fragment. The 4 lanes of a quad share their
// rows. They reduce the maximum at every key block. Each lane sums its own part of P; the quad
// reduces the sums once, at the end.
#pragma once

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "cuda/device/score_scale.h"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "primitives/fast_math.h"

namespace sink_attention::cuda {

SA_DEVICE float tanh_by_exp2(float x) {
  const float power = primitives::exp2_approx(x * static_cast<float>(2 * attention::kLog2E));
  return 1.0f - 2.0f * primitives::reciprocal_approx(power + 1.0f);
}

// Applies softcap or negation in place. Afterwards score * softmax_scale_log2 is the logit, base 2.
template <int kTilesM, int kTilesN>
SA_DEVICE void transform_scores(Accumulators<kTilesM, kTilesN>& s, int form, float to_tanh) {
  if (form == kSoftcap) {
    s.for_each([&](float& score) { score = tanh_by_exp2(score * to_tanh); });
  } else if (form == kNegated) {
    s.for_each([](float& score) { score = -score; });
  }
}

// Sets the scores of masked keys to -inf. The accumulators begin at PackGQA row `first_row`
// (pack_gqa.cuh) and key `first_key`. For calls without a tree mask.
template <int kTilesM, int kTilesN>
SA_DEVICE void mask_scores(Accumulators<kTilesM, kTilesN>& s, const attention::Mask& mask,
                           int first_row, int qhead_per_khead, int first_key) {
  const int first_col = first_key + accumulator_col(primitives::lane_idx(), 0);
  const int num_sink_tokens = static_cast<int>(mask.num_sink_tokens);
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + accumulator_row(primitives::lane_idx(), 2 * half);
      const attention::Range keys = mask.window_keys(row / qhead_per_khead);
      const int begin = static_cast<int>(keys.begin);
      const int end = static_cast<int>(keys.end);
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          const int key = first_col + 8 * n + col;
          if ((key < begin && key >= num_sink_tokens) || key >= end) {
            s.c[m][n][2 * half + col] = attention::negative_infinity<float>();
          }
        }
      }
    }
  }
}

// A word whose lowest `count` bits are set.
SA_DEVICE uint64_t lowest_bits(int count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// The same with a tree mask. Rows beyond the last, which are never stored, use the last row's mask.
// A row's visible keys are one word, a bit for each key from the thread's first column on. That
// keeps registers low, since calls without a tree mask run kernels that contain this branch.
template <int kTilesM, int kTilesN>
SA_DEVICE void mask_tree_scores(Accumulators<kTilesM, kTilesN>& s, const attention::Mask& mask,
                                int first_row, int qhead_per_khead, int first_key) {
  static_assert(8 * kTilesN <= 64, "one bit of the word for each key");
  const int first_col = first_key + accumulator_col(primitives::lane_idx(), 0);
  const int context = static_cast<int>(mask.context()) - first_col;  // bit of the first draft
  const int sink_tokens = static_cast<int>(mask.num_sink_tokens) - first_col;
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + accumulator_row(primitives::lane_idx(), 2 * half);
      const int64_t position = attention::min_of(row / qhead_per_khead, mask.seqlen_q - 1);
      const attention::Range window = mask.window_keys(position);
      uint64_t visible =
          lowest_bits(context) &
          (~lowest_bits(static_cast<int>(window.begin) - first_col) | lowest_bits(sink_tokens));
      const uint64_t drafts = mask.visible_drafts(position);
      if (0 <= context && context < 64) visible |= drafts << context;
      if (-64 < context && context < 0) visible |= drafts >> -context;
      visible &= lowest_bits(static_cast<int>(window.end) - first_col);
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          if (((visible >> (8 * n + col)) & 1) == 0) {
            s.c[m][n][2 * half + col] = attention::negative_infinity<float>();
          }
        }
      }
    }
  }
}

// Running state of a thread's rows. `max` is the row's largest score, before softmax_scale_log2.
// `sum` is this lane's part of the sum of P.
template <int kTilesM>
struct RowStates {
  float max[kTilesM][2];
  float sum[kTilesM][2];

  SA_DEVICE void clear() {
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        max[m][half] = attention::negative_infinity<float>();
        sum[m][half] = 0.0f;
      }
    }
  }

  // The row's state in base 2, as fold_sink takes it. All lanes of the quad call and get it.
  SA_DEVICE attention::RowState<float> whole(int m, int half, float softmax_scale_log2) const {
    return {max[m][half] * softmax_scale_log2, quad_sum(sum[m][half])};
  }
};

// In place S -> P = 2^kShift * exp2(S * softmax_scale_log2 - max). Updates max and sum; sum is
// already rescaled. Returns in `rescale` the factor that the caller applies to O.
template <int kShift = 0, int kTilesM, int kTilesN>
SA_DEVICE void online_softmax(Accumulators<kTilesM, kTilesN>& s, RowStates<kTilesM>& states,
                              float softmax_scale_log2, float (&rescale)[kTilesM][2]) {
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float old_max = states.max[m][half];
      float max = old_max;
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          const float score = s.c[m][n][2 * half + col];
          max = score > max ? score : max;
        }
      }
      max = quad_max(max);
      states.max[m][half] = max;
      // A row without visible keys so far has max = -inf. Subtracting 0 then gives P = 0, not NaN.
      const float base =
          max == attention::negative_infinity<float>() ? 0.0f : max * softmax_scale_log2;
      rescale[m][half] =
          old_max == max ? 1.0f : primitives::exp2_approx(old_max * softmax_scale_log2 - base);
      const float shifted_base = base - static_cast<float>(kShift);
      float sum = states.sum[m][half] * rescale[m][half];
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          float& score = s.c[m][n][2 * half + col];
          score = primitives::exp2_approx(score * softmax_scale_log2 - shifted_base);
          sum += score;
        }
      }
      states.sum[m][half] = sum;
    }
  }
}

template <int kTilesM, int kTilesV>
SA_DEVICE void rescale_rows(Accumulators<kTilesM, kTilesV>& out,
                            const float (&rescale)[kTilesM][2]) {
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int n = 0; n < kTilesV; ++n) {
      SA_UNROLL
      for (int reg = 0; reg < 4; ++reg) out.c[m][n][reg] *= rescale[m][reg / 2];
    }
  }
}

// online_softmax, and O rescaled to the new maxima.
template <int kTilesM, int kTilesN, int kTilesV>
SA_DEVICE void online_softmax_rescale(Accumulators<kTilesM, kTilesN>& s, RowStates<kTilesM>& states,
                                      Accumulators<kTilesM, kTilesV>& out,
                                      float softmax_scale_log2) {
  float rescale[kTilesM][2];
  online_softmax(s, states, softmax_scale_log2, rescale);
  rescale_rows(out, rescale);
}

}  // namespace sink_attention::cuda
