// The shared memory of a float8 forward block, and what its consumers do for float8.
//
// S = Q K^T takes Q and K as they are. The tensor cores want both 8-bit operands summed along rows,
// and in O = P V the rows of V are keys; so beside V as it was copied there is V^T, a row for each
// column of head_dim (transposer.cuh). Its keys lie in the order of to_float8_operands.
//
// Weights are rounded to e4m3, whose numbers from 2^-6 on have 4 significant bits, those below down
// to 2^-9 fewer. The largest of a row is made 2^8 instead of 1, so that weights down to 2^-14 of it
// keep their 4 bits. The sums have the same factor, which their quotient loses. A factor for all
// terms is nothing to the tensor cores' sums, which have float32's exponents; but of products in
// one sum they keep what is above 2^-13 of the largest (output.cuh). So in the block of a row's
// largest weights those below 2^-13 of them are lost beside a value of the same size; in other
// blocks not.
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
  static constexpr int kWeightShift = 8;
  using QTile = SmemTile<Float8Pair, Tiles::kBlockM, Tiles::kHeadDim / 2>;
  using KTile = SmemTile<Float8Pair, Tiles::kBlockN, Tiles::kHeadDim / 2>;
  using LoadedVTile = SmemTile<Float8Pair, Tiles::kBlockN, Tiles::kHeadDimV / 2>;
  using VTile = SmemTile<Float8Pair, Tiles::kHeadDimV, Tiles::kBlockN / 2>;  // V^T
  using Output = FlashFwdFloat8Output<Tiles, VTile>;
  static_assert(sizeof(QTile) % 1024 == 0 && sizeof(KTile) % 1024 == 0 && sizeof(VTile) % 1024 == 0,
                "the swizzle's pattern begins at each tile");

  struct WorkScale {
    ScoreScale score;
    float out;
  };

  alignas(1024) QTile q[Tiles::kQueryStages];
  alignas(1024) KTile k[Tiles::kStages];
  alignas(1024) LoadedVTile copied_v[Tiles::kStages];
  alignas(1024) VTile v[Tiles::kStages];
  WorkQueue<Tiles::kConsumers> works;
  WorkScale scale[kWorkSlots];       // of each work's sequence and kv head
  KeyBounds bounds[Tiles::kBlockM];  // of each row; written and read by the warp that owns it
  Ring<Tiles::kQueryStages> q_ring;
  Ring<Tiles::kStages> k_ring;
  Ring<Tiles::kStages> copied_v_ring;
  Ring<Tiles::kStages> v_ring;

  SA_DEVICE void init_rings() {
    constexpr int kUsers = 4 * Tiles::kConsumers;  // warps
    q_ring.init(kLoadArrivals, kUsers);
    k_ring.init(kLoadArrivals, kUsers);
    copied_v_ring.init(kLoadArrivals, kTransposingWarps);
    v_ring.init(kTransposingWarps, kUsers);
    works.init(kUsers + 1 + kTransposingWarps);
  }
  SA_DEVICE LoadedVTile& loaded_v(int stage) { return copied_v[stage]; }
  SA_DEVICE Ring<Tiles::kStages>& loaded_v_ring() { return copied_v_ring; }

  // The scales of the work in a slot, with the descales of its sequence and kv head.
  SA_DEVICE void write_scale(const FlashFwdKernelParams& params, int slot) {
    ScoreScale score =
        params.scale.times(descale(params.q_descale, slot) * descale(params.k_descale, slot));
    // A factor of 0 would turn a hidden score into 0 * inf; one this small has the same weights.
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
  SA_DEVICE static void to_operands(const Accumulators<1, Tiles::kBlockN / 8>& weights,
                                    uint32_t (&p)[Tiles::kBlockN / kStepKeys][4]) {
    to_float8_operands(weights, p);
  }

 private:
  static constexpr float kLeastScale = 1e-30f;

  SA_DEVICE float descale(const attention::Descale& descale, int slot) const {
    if (descale.data == nullptr) return 1.0f;
    const Work<Tiles::kConsumers>& work = works.work[slot];
    return primitives::load_global(descale.data +
                                   primitives::load_shared(&work.batch_idx) * descale.stride_batch +
                                   primitives::load_shared(&work.kv_head) * descale.stride_head);
  }
};

}  // namespace sink_attention::cuda::sm90
