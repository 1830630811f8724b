// From scores to logits, in float or double, and the tile coordinates of a CTA.
#pragma once

#include <cmath>

#include "attention/mask.h"
#include "cuda/device/key_range.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/device/score_scale.h"
#include "cuda/simt/tile.cuh"

namespace sink_attention::cuda::simt {

// A score in the form in which transformed * softmax_scale_log2 is the logit, in base 2.
template <class Real>
SA_DEVICE Real transform(const ScoreScaleOf<Real>& scale, Real score) {
  if (scale.form == kSoftcap) return std::tanh(score * scale.to_tanh);
  return scale.form == kNegated ? -score : score;
}
// Derivative of transform, without the factors of the scale.
template <class Real>
SA_DEVICE Real slope(const ScoreScaleOf<Real>& scale, Real transformed) {
  return scale.form == kSoftcap ? Real(1) - transformed * transformed : Real(1);
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
