// Scores into weights: softcap, mask, running maximum, exponentials, all on a warp's accumulators.
//
// A thread holds, of each 16-row tile m, two rows (half 0: row lane / 4, half 1: 8 below), and of
// each of them two columns in every 8-column tile. Maxima are shared by the 4 lanes of a quad at
// every block of keys; each lane sums its own weights, and the quad's sums meet once, at the end.
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

// Brings scores into the form in which score * softmax_scale_log2 is the logit.
template <int kTilesM, int kTilesN>
SA_DEVICE void transform_scores(Accumulators<kTilesM, kTilesN>& s, int form, float to_tanh) {
  if (form == kSoftcap) {
    s.for_each([&](float& score) { score = tanh_by_exp2(score * to_tanh); });
  } else if (form == kNegated) {
    s.for_each([](float& score) { score = -score; });
  }
}

// Hides the scores of keys that a row does not see. The accumulators' first row is packed row
// `first_row` of groups of `group` query heads (pack_gqa.cuh), their first column key
// `first_key`. Not with a tree mask.
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

// The lowest `count` bits of a word.
SA_DEVICE uint64_t lowest_bits(int count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// The same with a tree mask. Rows beyond the last, which nobody stores, see what the last one does.
// What a row sees becomes one word, a bit for each key from the thread's first column on: kernels
// without a tree mask have this branch too, and it shall cost them no registers.
template <int kTilesM, int kTilesN>
SA_DEVICE void mask_tree_scores(Accumulators<kTilesM, kTilesN>& s, const attention::Mask& mask,
                                int first_row, int qhead_per_khead, int first_key) {
  static_assert(8 * kTilesN <= 64, "a bit for each key");
  const int first_col = first_key + accumulator_col(primitives::lane_idx(), 0);
  const int context = static_cast<int>(mask.context()) - first_col;  // bits before the drafts'
  const int sink_tokens = static_cast<int>(mask.num_sink_tokens) - first_col;
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + accumulator_row(primitives::lane_idx(), 2 * half);
      const int64_t position = attention::min_of(row / qhead_per_khead, mask.seqlen_q - 1);
      const attention::Range window = mask.window_keys(position);
      uint64_t seen =
          lowest_bits(context) &
          (~lowest_bits(static_cast<int>(window.begin) - first_col) | lowest_bits(sink_tokens));
      const uint64_t drafts = mask.visible_drafts(position);
      if (0 <= context && context < 64) seen |= drafts << context;
      if (-64 < context && context < 0) seen |= drafts >> -context;
      seen &= lowest_bits(static_cast<int>(window.end) - first_col);
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          if (((seen >> (8 * n + col)) & 1) == 0) {
            s.c[m][n][2 * half + col] = attention::negative_infinity<float>();
          }
        }
      }
    }
  }
}

// The softmax of a thread's rows so far: the largest score (not yet times softmax_scale_log2), and this lane's
// part of the sum of weights.
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

  // The whole row's state, in base 2, as fold_sink takes it; in all lanes of the quad.
  SA_DEVICE attention::RowState<float> whole(int m, int half, float softmax_scale_log2) const {
    return {max[m][half] * softmax_scale_log2, quad_sum(sum[m][half])};
  }
};

// Scores to weights in place. What the sums so far, and the output so far, are to be multiplied
// with to be re-based on the new maxima: rescale; the sums are. Weights, and so the sums, are
// 2^kShift times as large as the maxima say.
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
      // A row that has seen no key keeps the maximum -inf; subtracting 0 gives weights of 0, not
      // NaN.
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

// Scores to weights in place; out is re-based on the new maxima.
template <int kTilesM, int kTilesN, int kTilesV>
SA_DEVICE void online_softmax_rescale(Accumulators<kTilesM, kTilesN>& s, RowStates<kTilesM>& states,
                                      Accumulators<kTilesM, kTilesV>& out,
                                      float softmax_scale_log2) {
  float rescale[kTilesM][2];
  online_softmax(s, states, softmax_scale_log2, rescale);
  rescale_rows(out, rescale);
}

}  // namespace sink_attention::cuda
