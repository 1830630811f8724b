// Scores of a row into weights: mask, scale, softcap, exponentiate, keep the running maximum and
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

// Scores become base-2 logits by one multiplication, or, under softcap, by cap * tanh(score * scale
// / cap) * log2 e.
template <class Real>
struct ScoreScale {
  bool has_softcap;
  Real softmax_scale_log2;  // softmax_scale * log2 e, or, under softcap, cap * log2 e
  Real to_tanh;             // softmax_scale / cap
  Real hidden;              // the score that softmax_scale_log2 takes to -inf
};

template <class Real>
SA_INLINE ScoreScale<Real> score_scale(const attention::FlashFwdParams& params) {
  // A scale of 0 would turn a hidden score into 0 * inf; one this small has the same exponentials.
  const double softmax_scale = params.softmax_scale == 0 ? 1e-30 : params.softmax_scale;
  const bool has_softcap = params.softcap > 0;
  ScoreScale<Real> scale{};
  scale.has_softcap = has_softcap;
  scale.softmax_scale_log2 =
      static_cast<Real>((has_softcap ? params.softcap : softmax_scale) * attention::kLog2E);
  scale.to_tanh = has_softcap ? static_cast<Real>(softmax_scale / params.softcap) : Real(0);
  scale.hidden = scale.softmax_scale_log2 > 0 ? attention::negative_infinity<Real>()
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

// value where begin <= j < end, else `outside`, for the lanes j = first ...; indices are exact in
// Real (below 2^24).
template <class Real>
SA_INLINE Vec<Real> keep_range(Vec<Real> value, int64_t first, Range range, Vec<Real> outside) {
  const Vec<Real> lanes = lane_indices<Real>();
  const Real begin = static_cast<Real>(max_of(range.begin - first, -1));
  const Real end = static_cast<Real>(min_of(max_of(range.end - first, -1), kLanes<Real>));
  const Vec<Real> from_begin = lanes >= begin ? value : outside;
  return lanes < end ? from_begin : outside;
}

// Sets the scores outside `visible` to `hidden_score`; touches only the vectors on which an edge
// lies or that are hidden whole.
template <class Real>
SA_INLINE void mask_row(Real* scores, int64_t count, Range visible, Real hidden_score) {
  constexpr int kStep = kLanes<Real>;
  const Vec<Real> hidden = broadcast(hidden_score);
  for (int64_t j = 0; j < visible.begin; j += kStep) {
    store(scores + j, keep_range<Real>(load(scores + j), j, visible, hidden));
  }
  for (int64_t j = max_of(visible.end, 0) / kStep * kStep; j < count; j += kStep) {
    store(scores + j, keep_range<Real>(load(scores + j), j, visible, hidden));
  }
}

// Keys between the first and the last that a row sees which it does not see, counted like them.
struct HiddenKeys {
  Range gap;            // between the sink tokens and the window
  int64_t first_draft;  // with a tree mask, the key that bit 0 of visible_drafts stands for
  uint64_t visible_drafts;
  bool has_drafts;

  SA_INLINE bool is_empty() const { return gap.begin >= gap.end && !has_drafts; }
};

template <class Real>
void hide_keys(Real* scores, const HiddenKeys& hidden, Range visible, Real hidden_score) {
  const Range gap = intersect(hidden.gap, visible);
  for (int64_t j = gap.begin; j < gap.end; ++j) scores[j] = hidden_score;
  if (!hidden.has_drafts) return;
  for (int64_t j = max_of(hidden.first_draft, visible.begin); j < visible.end; ++j) {
    if (((hidden.visible_drafts >> (j - hidden.first_draft)) & 1) == 0) scores[j] = hidden_score;
  }
}

// One row of `count` scores (a multiple of 2 kLanes) in place: weights as units; returns what the
// row's earlier output is to be multiplied with. The row sees the keys of `visible` but for those
// `hidden`.
template <class Arithmetic>
SA_INLINE typename Arithmetic::Real softmax_row(typename Arithmetic::Real* scores, int64_t count,
                                                Range visible, const HiddenKeys& hidden,
                                                const ScoreScale<typename Arithmetic::Real>& scale,
                                                RowState<typename Arithmetic::Real>& state) {
  using Real = typename Arithmetic::Real;
  using Unit = typename Arithmetic::Unit;
  constexpr int kStep = kLanes<Real>;
  Unit* weights = reinterpret_cast<Unit*>(scores);
  if (visible.begin >= visible.end) {
    memset(weights, 0, count / Arithmetic::kPair * sizeof(Unit));
    return Real(1);
  }
  if (scale.has_softcap) {
    for (int64_t j = 0; j < count; j += kStep)
      store(scores + j, tanh<Real>(load(scores + j) * scale.to_tanh));
  }
  if (visible.begin > 0 || visible.end < count) mask_row(scores, count, visible, scale.hidden);
  if (!hidden.is_empty()) hide_keys(scores, hidden, visible, scale.hidden);

  // Logits first, rounded once: the largest minus the maximum is then exactly 0, however large it
  // is. (A negative scale turns the order round, so the maximum is that of the logits, not of the
  // scores.)
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
  // A row whose visible logits are all -inf keeps the maximum -inf; subtracting 0 then gives
  // weights of 0, not NaN.
  const Real base = max == attention::negative_infinity<Real>() ? Real(0) : max;

  Vec<Real> sum0{};
  Vec<Real> sum1{};
  for (int64_t j = 0; j < count; j += 2 * kStep) {
    const Vec<Real> weight0 = Arithmetic::weight_exp2(load(scores + j) - base);
    const Vec<Real> weight1 = Arithmetic::weight_exp2(load(scores + j + kStep) - base);
    sum0 += weight0;
    sum1 += weight1;
    store_row_units<Arithmetic>(weights, j, weight0);
    store_row_units<Arithmetic>(weights, j + kStep, weight1);
  }
  const Real rescale = attention::rebase_factor(state.max, max);
  state.sum = state.sum * rescale + reduce_add<Real>(sum0 + sum1);
  state.max = max;
  return rescale;
}

}  // namespace sink_attention::cpu::SA_ISA
