// From scores to logits, in float or double, and the tile coordinates of a CTA.
#pragma once

#include <cmath>

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "cuda/device/key_range.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/tile.cuh"

namespace sink_attention::cuda::simt {

// From a score <q, k> to a logit in base 2: logit = transform(score) * softmax_scale_log2.
template <class Real>
struct ScoreScale {
  Real softmax_scale_log2;  // |softmax_scale| * log2 e; with softcap, softcap * log2 e. Positive
  Real to_tanh;             // softmax_scale / softcap; 0 without softcap
  bool has_softcap;
  bool negated;

  SA_DEVICE Real transform(Real score) const {
    return has_softcap ? std::tanh(score * to_tanh) : (negated ? -score : score);
  }
  // Derivative of transform, without the factors of the scale.
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

// Keys in the window of a PackGQA row; none for a row beyond the last.
SA_DEVICE KeyRange window_keys(const attention::Mask& mask, const PackGqa& rows, int row) {
  if (row >= rows.num_rows) return {0, 0};
  const attention::Range keys = mask.window_keys(rows.position(row));
  return {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
}

// The work tile of a CTA. Grids are one-dimensional, so that no extent is limited to 65535. The
// last row tiles, which have the most visible keys under a causal mask, start first.
struct TileCoord {
  int tile;
  int kv_head;
  int batch_idx;
};

SA_DEVICE TileCoord tile_coord(const attention::FlashFwdParams& params, int num_tiles) {
  const int block = primitives::block_idx().x;
  const int head = block / num_tiles;
  const int num_heads_kv = static_cast<int>(params.num_heads_kv);
  return {num_tiles - 1 - block % num_tiles, head % num_heads_kv, head / num_heads_kv};
}

}  // namespace sink_attention::cuda::simt
