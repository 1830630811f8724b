// The shared memory of a float8 forward CTA, and the operations that depend on the type.
//
// S = Q K^T takes Q and K as they are. With 8-bit operands, k must run along the rows of both; in
// O = P V the rows of V are keys. So beside the loaded V there is V^T, a row for each column of V
// (transposer.cuh). The order of keys within V^T is that of to_float8_operands.
//
// P is rounded to e4m3, which has 4 significant bits down to 2^-6, and fewer down to 2^-9. So P is
// scaled by 2^kPShift: the largest of a row is 2^8 instead of 1, and elements down to 2^-14 of it
// keep 4 bits. The row sums have the same factor, so it cancels in O.
//
// A common factor does not change the tensor cores' sums, which have float32's exponent range. But
// a sum keeps only what is above 2^-13 of its largest product (output.cuh). So in the block with a
// row's largest P, smaller P below 2^-13 of it are lost where values have equal size. In other
// blocks they are not.
#pragma once

#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/flash_fwd_fp8/output.cuh"

namespace sink_attention::cuda::sm90 {

constexpr int kTransposingWarps = 3;

template <class Tiles>
struct FlashFwdStorage<attention::Float8E4M3, Tiles> {
  using Out = attention::BFloat16;
  static constexpr bool kTransposesValues = true;
  static constexpr int kStepKeys = 2 * kStepDepth;
  static constexpr int kPShift = 8;
  using QTile = SmemTile<Float8Pair, Tiles::kBlockM, Tiles::kHeadDim / 2>;
  using KTile = SmemTile<Float8Pair, Tiles::kBlockN, Tiles::kHeadDim / 2>;
  using LoadedVTile = SmemTile<Float8Pair, Tiles::kBlockN, Tiles::kHeadDimV / 2>;
  using VTile = SmemTile<Float8Pair, Tiles::kHeadDimV, Tiles::kBlockN / 2>;  // V^T
  using Output = FlashFwdFp8Output<Tiles, VTile>;
  static_assert(sizeof(QTile) % 1024 == 0 && sizeof(KTile) % 1024 == 0 && sizeof(VTile) % 1024 == 0,
                "the swizzle's pattern begins at each tile");

  struct TileScale {
    ScoreScale score;
    float out;
  };

  alignas(1024) QTile q[Tiles::kQueryStages];
  alignas(1024) KTile k[Tiles::kStages];
  alignas(1024) LoadedVTile v_loaded[Tiles::kStages];
  alignas(1024) VTile v[Tiles::kStages];
  WorkTileQueue<Tiles::kConsumers> work_tiles;
  TileScale scale[kWorkTileSlots];   // of the sequence and kv head of a slot's tile
  KeyBounds bounds[Tiles::kBlockM];  // of each row; written and read by the warp that owns the row
  Ring<Tiles::kQueryStages> q_ring;
  Ring<Tiles::kStages> k_ring;
  Ring<Tiles::kStages> v_loaded_ring;
  Ring<Tiles::kStages> v_ring;

  SA_DEVICE void init_rings() {
    constexpr int kConsumerWarps = 4 * Tiles::kConsumers;
    q_ring.init(kLoadArrivals, kConsumerWarps);
    k_ring.init(kLoadArrivals, kConsumerWarps);
    v_loaded_ring.init(kLoadArrivals, kTransposingWarps);
    v_ring.init(kTransposingWarps, kConsumerWarps);
    work_tiles.init(kConsumerWarps + 1 + kTransposingWarps);
  }
  SA_DEVICE LoadedVTile& loaded_v(int stage) { return v_loaded[stage]; }
  SA_DEVICE Ring<Tiles::kStages>& loaded_v_ring() { return v_loaded_ring; }

  // Stores the scales of the work tile in a slot, with the descales of its sequence and kv head.
  SA_DEVICE void write_scale(const FlashFwdKernelParams& params, int slot) {
    ScoreScale score =
        params.scale.times(descale(params.q_descale, slot) * descale(params.k_descale, slot));
    // A scale of 0 would turn a masked score into 0 * -inf = NaN. One this small gives the same P.
    if (score.softmax_scale_log2 < kLeastScale) score.softmax_scale_log2 = kLeastScale;
    primitives::store_shared(&scale[slot].score.softmax_scale_log2, score.softmax_scale_log2);
    primitives::store_shared(&scale[slot].score.to_tanh, score.to_tanh);
    primitives::store_shared(&scale[slot].score.form, score.form);
    primitives::store_shared(&scale[slot].out, descale(params.v_descale, slot));
  }
  SA_DEVICE ScoreScale score_scale(const FlashFwdKernelParams&, int slot) const {
    const ScoreScale& score = scale[slot].score;
    return {primitives::load_shared(&score.softmax_scale_log2),
            primitives::load_shared(&score.to_tanh), primitives::load_shared(&score.form)};
  }
  SA_DEVICE float out_scale(int slot) const { return primitives::load_shared(&scale[slot].out); }
  SA_DEVICE static void to_operands(const Accumulators<1, Tiles::kBlockN / 8>& probabilities,
                                    uint32_t (&p)[Tiles::kBlockN / kStepKeys][4]) {
    to_float8_operands(probabilities, p);
  }

 private:
  static constexpr float kLeastScale = 1e-30f;

  SA_DEVICE float descale(const attention::Descale& descale, int slot) const {
    if (descale.data == nullptr) return 1.0f;
    const WorkTileInfo<Tiles::kConsumers>& work_tile = work_tiles.tile[slot];
    return primitives::load_global(
        descale.data + primitives::load_shared(&work_tile.batch_idx) * descale.stride_batch +
        primitives::load_shared(&work_tile.kv_head) * descale.stride_head);
  }
};

}  // namespace sink_attention::cuda::sm90
