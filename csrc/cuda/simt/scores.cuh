// From scores to logits and weights, in float or double.
#pragma once

#include <cmath>

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/tile.cuh"

namespace sink_attention::cuda::simt {

// How a score <q, k> becomes a logit in base 2: it is transformed, then multiplied with softmax_scale_log2 >
// 0.
template <class Real>
struct ScoreScale {
  Real softmax_scale_log2;  // |softmax_scale| * log2 e, or, under softcap, cap * log2 e
  Real to_tanh;             // softmax_scale / cap
  bool has_softcap;
  bool negated;

  SA_DEVICE Real transform(Real score) const {
    return has_softcap ? std::tanh(score * to_tanh) : (negated ? -score : score);
  }
  // The transformed score's slope, but for the scale.
  SA_DEVICE Real slope(Real transformed) const {
    return has_softcap ? Real(1) - transformed * transformed : Real(1);
  }
};

template <class Real>
SA_DEVICE ScoreScale<Real> score_scale(const attention::FlashFwdParams& params) {
  // A scale of 0 would turn a hidden score into 0 * inf; one this small has the same exponentials.
  const double given = params.softmax_scale == 0 ? 1e-30 : params.softmax_scale;
  ScoreScale<Real> scale{};
  scale.has_softcap = params.softcap > 0;
  scale.negated = given < 0 && !scale.has_softcap;
  scale.to_tanh = scale.has_softcap ? static_cast<Real>(given / params.softcap) : Real(0);
  scale.softmax_scale_log2 = static_cast<Real>(
      (scale.has_softcap ? params.softcap : (given < 0 ? -given : given)) * attention::kLog2E);
  return scale;
}

// The keys [begin, end) in a packed row's window; none if it is beyond the last row. Sink tokens
// before `end` are visible too.
struct alignas(8) KeyRange {
  int begin;
  int end;

  SA_DEVICE bool sees(int key, int num_sink_tokens) const {
    return (begin <= key || key < num_sink_tokens) && key < end;
  }
};

SA_DEVICE KeyRange window_keys(const attention::Mask& mask, const PackGqa& rows, int row) {
  if (row >= rows.num_rows) return {0, 0};
  const attention::Range keys = mask.window_keys(rows.position(row));
  return {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
}

// Which tile, kv head and sequence a block works on. Grids are one-dimensional, so that no extent
// is bounded by 65535. The last tiles, which see the most keys under a causal mask, start first.
struct BlockPlace {
  int tile;
  int kv_head;
  int batch_idx;
};

SA_DEVICE BlockPlace place_of_block(const attention::FlashFwdParams& params, int num_tiles) {
  const int block = primitives::block_idx().x;
  const int head = block / num_tiles;
  const int num_heads_kv = static_cast<int>(params.num_heads_kv);
  return {num_tiles - 1 - block % num_tiles, head % num_heads_kv, head / num_heads_kv};
}

}  // namespace sink_attention::cuda::simt
