// Online softmax of a row of scores, in place: softcap, mask, scale, S -> P, running maximum and
// sum.
#pragma once

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "cpu/simd/arithmetic.h"

namespace sink_attention::cpu::SA_ISA {

using attention::intersect;
using attention::max_of;
using attention::min_of;
using attention::Range;
using attention::RowState;

// From scores to base-2 logits:
//
//   without softcap   score * softmax_scale * log2 e
//   with softcap      softcap * tanh(score * softmax_scale / softcap) * log2 e
template <class Real>
struct ScoreScale {
  bool has_softcap;
  Real softmax_scale_log2;  // softmax_scale * log2 e; with softcap: softcap * log2 e
  Real to_tanh;             // softmax_scale / softcap
  Real masked;              // the score of a masked key: times softmax_scale_log2, it is -inf
};

template <class Real>
SA_INLINE ScoreScale<Real> score_scale(const attention::FlashFwdParams& params) {
  // A scale of 0 would turn a masked score into 0 * inf. 1e-30 gives the same exponentials.
  const double softmax_scale = params.softmax_scale == 0 ? 1e-30 : params.softmax_scale;
  const bool has_softcap = params.softcap > 0;
  ScoreScale<Real> scale{};
  scale.has_softcap = has_softcap;
  scale.softmax_scale_log2 =
      static_cast<Real>((has_softcap ? params.softcap : softmax_scale) * attention::kLog2E);
  scale.to_tanh = has_softcap ? static_cast<Real>(softmax_scale / params.softcap) : Real(0);
  scale.masked = scale.softmax_scale_log2 > 0 ? attention::negative_infinity<Real>()
                                              : -attention::negative_infinity<Real>();
  return scale;
}

template <class Real>
SA_INLINE Vec<Real> lane_indices() {
  Vec<Real> indices;
  SA_UNROLL
  for (int lane = 0; lane < kLanes<Real>; ++lane) indices[lane] = static_cast<Real>(lane);
  return indices;
}

// `value` where begin <= j < end, else `outside`, for the lanes j = first, first + 1, ... Indices
// are below 2^24, so they are exact in Real.
template <class Real>
SA_INLINE Vec<Real> keep_range(Vec<Real> value, int64_t first, Range range, Vec<Real> outside) {
  const Vec<Real> lanes = lane_indices<Real>();
  const Real begin = static_cast<Real>(max_of(range.begin - first, -1));
  const Real end = static_cast<Real>(min_of(max_of(range.end - first, -1), kLanes<Real>));
  const Vec<Real> from_begin = lanes >= begin ? value : outside;
  return lanes < end ? from_begin : outside;
}

// Sets the scores outside `visible` to `masked_score`. Touches only vectors that hold a masked key.
template <class Real>
SA_INLINE void mask_row(Real* scores, int64_t count, Range visible, Real masked_score) {
  constexpr int kStep = kLanes<Real>;
  const Vec<Real> masked = broadcast(masked_score);
  for (int64_t j = 0; j < visible.begin; j += kStep) {
    store(scores + j, keep_range<Real>(load(scores + j), j, visible, masked));
  }
  for (int64_t j = max_of(visible.end, 0) / kStep * kStep; j < count; j += kStep) {
    store(scores + j, keep_range<Real>(load(scores + j), j, visible, masked));
  }
}

// The masked keys between a row's first and last visible key, as indices of its scores.
struct MaskedKeys {
  Range gap;            // between the sink tokens and the window
  int64_t first_draft;  // tree mask: the index of draft 0, which is bit 0 of visible_drafts
  uint64_t visible_drafts;
  bool has_drafts;

  SA_INLINE bool is_empty() const { return gap.begin >= gap.end && !has_drafts; }
};

template <class Real>
void mask_gap_and_drafts(Real* scores, const MaskedKeys& masked, Range visible, Real masked_score) {
  const Range gap = intersect(masked.gap, visible);
  for (int64_t j = gap.begin; j < gap.end; ++j) scores[j] = masked_score;
  if (!masked.has_drafts) return;
  for (int64_t j = max_of(masked.first_draft, visible.begin); j < visible.end; ++j) {
    if (((masked.visible_drafts >> (j - masked.first_draft)) & 1) == 0) scores[j] = masked_score;
  }
}

// S -> P of one row of `count` scores (a multiple of 2 kLanes), in place; P is stored as units. The
// row sees the keys of `visible` that are not `masked`. Updates `state`; returns the factor that
// rescales the row's O.
template <class Arithmetic>
SA_INLINE typename Arithmetic::Real softmax_row(typename Arithmetic::Real* scores, int64_t count,
                                                Range visible, const MaskedKeys& masked,
                                                const ScoreScale<typename Arithmetic::Real>& scale,
                                                RowState<typename Arithmetic::Real>& state) {
  using Real = typename Arithmetic::Real;
  using Unit = typename Arithmetic::Unit;
  constexpr int kStep = kLanes<Real>;
  Unit* p = reinterpret_cast<Unit*>(scores);
  if (visible.begin >= visible.end) {
    memset(p, 0, count / Arithmetic::kPair * sizeof(Unit));
    return Real(1);
  }
  if (scale.has_softcap) {
    for (int64_t j = 0; j < count; j += kStep)
      store(scores + j, tanh<Real>(load(scores + j) * scale.to_tanh));
  }
  if (visible.begin > 0 || visible.end < count) mask_row(scores, count, visible, scale.masked);
  if (!masked.is_empty()) mask_gap_and_drafts(scores, masked, visible, scale.masked);

  // Scores are rounded to logits before the maximum is subtracted, so the largest gives exactly 0.
  // The maximum is taken over logits, not scores: a negative scale reverses the order.
  Vec<Real> max0 = broadcast(state.max);
  Vec<Real> max1 = max0;
  for (int64_t j = 0; j < count; j += 2 * kStep) {
    const Vec<Real> logit0 = load(scores + j) * scale.softmax_scale_log2;
    const Vec<Real> logit1 = load(scores + j + kStep) * scale.softmax_scale_log2;
    store(scores + j, logit0);
    store(scores + j + kStep, logit1);
    max0 = maximum(logit0, max0);
    max1 = maximum(logit1, max1);
  }
  const Real max = reduce_max<Real>(maximum(max0, max1));
  // If all visible logits are -inf, so is the maximum. Subtracting 0 instead gives P = 0, not NaN.
  const Real base = max == attention::negative_infinity<Real>() ? Real(0) : max;

  Vec<Real> sum0{};
  Vec<Real> sum1{};
  for (int64_t j = 0; j < count; j += 2 * kStep) {
    const Vec<Real> p0 = Arithmetic::softmax_exp2(load(scores + j) - base);
    const Vec<Real> p1 = Arithmetic::softmax_exp2(load(scores + j + kStep) - base);
    sum0 += p0;
    sum1 += p1;
    store_row_units<Arithmetic>(p, j, p0);
    store_row_units<Arithmetic>(p, j + kStep, p1);
  }
  const Real rescale = attention::rebase_factor(state.max, max);
  state.sum = state.sum * rescale + reduce_add<Real>(sum0 + sum1);
  state.max = max;
  return rescale;
}

}  // namespace sink_attention::cpu::SA_ISA
