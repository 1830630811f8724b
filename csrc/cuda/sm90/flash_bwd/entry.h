// Hopper's backward: dense and varlen. A forward of any family may have come before: all that
// counts of it is out and lse.
#pragma once

#include "cuda/registry.h"
#include "cuda/sm90/flash_bwd/config.h"

namespace sink_attention::cuda::sm90 {

// dq, dk, dv and ds_aux: kernels/bwd_rows runs from here, before and after. Only with num_heads_q
// above 0; batch and lengths may be 0, and all gradients are then 0.
template <int kHeadDim, int kHeadDimV>
SA_LAUNCH launch_flash_bwd(const FlashBwdCall& call);

constexpr const char* kUnalignedBackward =
    "rows of q, k, v, dout, dk or dv are not in aligned parts of 16 bytes";

inline const char* why_not_flash_bwd(const CallShape& shape) {
  if (!shape.is_16_bit()) return "q is neither bfloat16 nor float16";
  if (std::max(shape.head_dim, shape.head_dim_v) <= 32) {
    return "head_dim and head_dim_v are at most 32";
  }
  for (const RowLayout* layout : {&shape.q, &shape.k, &shape.dk}) {
    if (!layout->is_vectorised(shape.head_dim, 2)) return kUnalignedBackward;
  }
  for (const RowLayout* layout : {&shape.v, &shape.dout, &shape.dv}) {
    if (!layout->is_vectorised(shape.head_dim_v, 2)) return kUnalignedBackward;
  }
  return nullptr;
}

// Of a tile's rows, those to use so that they are one TMA box of each slab even where a group of
// query heads does not divide the tile: whole positions. All of them where a quarter would have
// nothing to do.
inline int rows_of_whole_positions(const CallShape& shape, int tile_rows) {
  const int64_t qhead_per_khead = std::max<int64_t>(shape.qhead_per_khead(), 1);
  const int whole = static_cast<int>(tile_rows / qhead_per_khead * qhead_per_khead);
  return 4 * whole >= 3 * tile_rows ? whole : tile_rows;
}

}  // namespace sink_attention::cuda::sm90
