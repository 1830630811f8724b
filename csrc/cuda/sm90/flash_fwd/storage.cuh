// The shared memory of a forward CTA.
#pragma once

#include "cuda/sm90/flash_fwd/config.h"
#include "cuda/sm90/flash_fwd/output.cuh"
#include "cuda/sm90/flash_fwd/params.h"
#include "cuda/sm90/flash_fwd/work_tile.cuh"
#include "cuda/sm90/load_keys.cuh"
#include "cuda/sm90/operands.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm90 {

struct alignas(8) KeyBounds {  // the keys in a row's window: [begin, end)
  int begin;
  int end;
};

// For bfloat16 and float16, with the operations that depend on the type. Float8 has its own in
// flash_fwd_fp8/storage.cuh.
template <class Element, class Tiles>
struct FlashFwdStorage {
  using Out = Element;
  static constexpr bool kTransposesValues = false;
  static constexpr int kStepKeys = kStepDepth;  // keys of one wgmma step of P V
  static constexpr int kPShift = 0;             // P is scaled by 2^kPShift
  using QTile = SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDim>;
  using KTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDim>;
  using VTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDimV>;
  using LoadedVTile = VTile;  // as the producer writes it
  using Output = FlashFwdOutput<Tiles, VTile>;
  static_assert(sizeof(QTile) % 1024 == 0 && sizeof(KTile) % 1024 == 0 && sizeof(VTile) % 1024 == 0,
                "the swizzle's pattern begins at each tile");

  alignas(1024) QTile q[Tiles::kQueryStages];
  alignas(1024) KTile k[Tiles::kStages];
  alignas(1024) VTile v[Tiles::kStages];
  WorkTileQueue<Tiles::kConsumers> work_tiles;
  KeyBounds bounds[Tiles::kBlockM];  // of each row; written and read by the warp that owns the row
  Ring<Tiles::kQueryStages> q_ring;
  Ring<Tiles::kStages> k_ring;
  Ring<Tiles::kStages> v_ring;

  SA_DEVICE void init_rings() {
    constexpr int kConsumerWarps = 4 * Tiles::kConsumers;
    q_ring.init(kLoadArrivals, kConsumerWarps);
    k_ring.init(kLoadArrivals, kConsumerWarps);
    v_ring.init(kLoadArrivals, kConsumerWarps);
    work_tiles.init(kConsumerWarps + 1);  // and the producer
  }
  SA_DEVICE LoadedVTile& loaded_v(int stage) { return v[stage]; }
  SA_DEVICE Ring<Tiles::kStages>& loaded_v_ring() { return v_ring; }

  // The scales of the work tile in a slot. The scheduler's first lane writes them.
  SA_DEVICE void write_scale(const FlashFwdKernelParams&, int) {}
  SA_DEVICE ScoreScale score_scale(const FlashFwdKernelParams& params, int) const {
    return params.scale;
  }
  SA_DEVICE float out_scale(int) const { return 1.0f; }
  SA_DEVICE static void to_operands(const Accumulators<1, Tiles::kBlockN / 8>& probabilities,
                                    uint32_t (&p)[Tiles::kBlockN / kStepKeys][4]) {
    sm90::to_operands<Element>(probabilities, p);
  }
};

}  // namespace sink_attention::cuda::sm90
