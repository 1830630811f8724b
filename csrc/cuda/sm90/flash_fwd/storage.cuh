// The shared memory of a forward block.
#pragma once

#include "cuda/sm90/flash_fwd/config.h"
#include "cuda/sm90/flash_fwd/work.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm90 {

struct alignas(8) KeyBounds {  // of the keys in a row's window
  int begin;
  int end;
};

template <class Element, class Tiles>
struct FlashFwdStorage {
  using QTile = SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDim>;
  using KTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDim>;
  using VTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDimV>;
  static_assert(sizeof(QTile) % 1024 == 0 && sizeof(KTile) % 1024 == 0 && sizeof(VTile) % 1024 == 0,
                "the swizzle's pattern begins at each tile");

  alignas(1024) QTile q;
  alignas(1024) KTile k[Tiles::kStages];
  alignas(1024) VTile v[Tiles::kStages];
  Work work[4 * Tiles::kConsumers + 1];  // of each computing warp, and of the copying one
  KeyBounds bounds[Tiles::kBlockM];      // of each row; written and read by the warp that owns it
  Ring<1> q_ring;
  Ring<Tiles::kStages> k_ring;
  Ring<Tiles::kStages> v_ring;
};

}  // namespace sink_attention::cuda::sm90
