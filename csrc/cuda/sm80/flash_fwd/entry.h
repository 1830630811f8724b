// The forward's launches, and which of them are decodes. The rows are in sm80/table.cpp.
#pragma once

#include "cuda/registry.h"
#include "cuda/sm80/flash_fwd/config.h"

namespace sink_attention::cuda::sm80 {

// Dense, varlen and paged; Tiles: a Prefill or a Decode. Only with batch, seqlen_q and num_heads_q
// above 0.
template <class Tiles>
SA_LAUNCH launch_flash_fwd(const FlashFwdCall& call);

// PackGQA rows of a decode tile.
constexpr int kDecodeTileRows = 16;

// Decode tiles are for caches, and divide a row's sums among warps. With num_splits = 1, and in
// dense and varlen calls, all rows go through prefill tiles: a row's sums then have one order,
// whatever the rows and the lengths beside it.
inline bool is_decode(const CallShape& shape) {
  return shape.is_paged && shape.num_splits != 1 && shape.pack_gqa_rows() <= kDecodeTileRows;
}

}  // namespace sink_attention::cuda::sm80
