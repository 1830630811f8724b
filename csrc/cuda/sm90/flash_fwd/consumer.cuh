// A consumer warpgroup: 64 rows of the tile against the tile's blocks of keys.
//
// With S = Q K^T and O += P V, of block j of n:
//
//     products   S 0 | S 1, O 0 | S 2, O 1 | ... | S n - 1, O n - 2 | O n - 1
//     softmax          of S 0     of S 1     ...                of S n - 1
//
// So the softmax of a block overlaps the product P V of the block before it. With the
// warp-scheduler barrier it also overlaps the products of the other warpgroups: a warpgroup waits
// for its barrier, starts its two products, and arrives at the next warpgroup's barrier.
//
// Float8 computes O j - 1 in parts of its columns: the first part before S j, the others behind it
// (flash_fwd_fp8/output.cuh).
//
// A thread owns row accumulator_row(lane, 0) of its warp's 16 rows and the row 8 below; in each,
// two adjacent columns of every 8.
#pragma once

#include "cuda/device/load_sink.cuh"
#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/operands.cuh"
#include "cuda/sm90/store_rows.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/cta.h"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashFwdConsumer {
  using Storage = FlashFwdStorage<Element, Tiles>;
  using Out = typename Storage::Out;
  using QRing = Ring<Tiles::kQueryStages>;
  using KRing = Ring<Tiles::kStages>;
  static constexpr int kTilesN = Tiles::kBlockN / 8;
  // P of a block, as operand A.
  using POperands = uint32_t[Tiles::kBlockN / Storage::kStepKeys][4];
  static constexpr int kSchedulerBarrier = 1;  // named barrier of warpgroup 0; the others follow

  const FlashFwdKernelParams& params;
  Storage& storage;
  int warpgroup;
  int warp;  // of the CTA
  WorkTileIndex tile_idx{};

  SA_DEVICE void run() {
    if (Tiles::kUseSchedulerBarrier && warpgroup == Tiles::kConsumers - 1)
      warp_scheduler_barrier_arrive();  // lets warpgroup 0 begin
    typename QRing::PipelineState q_state;
    typename KRing::PipelineState kv_state;
    for (; storage.work_tiles.wait_for(tile_idx); storage.work_tiles.release(tile_idx))
      attend(q_state, kv_state);
    if (Tiles::kUseSchedulerBarrier && warpgroup == 0)
      warp_scheduler_barrier_sync();  // matches the last arrival
  }

 private:
  SA_DEVICE const WorkTileInfo<Tiles::kConsumers>& work_tile() const {
    return storage.work_tiles.tile[tile_idx.slot()];
  }
  SA_DEVICE int warp_row() const { return 16 * warp; }  // in the tile
  // The warp-scheduler barrier of a warpgroup: that one waits, the one before it arrives.
  SA_DEVICE void warp_scheduler_barrier_sync() const {
    primitives::sync_named(kSchedulerBarrier + warpgroup, 2 * primitives::kWarpgroupSize);
  }
  SA_DEVICE void warp_scheduler_barrier_arrive() const {
    const int next = warpgroup == Tiles::kConsumers - 1 ? 0 : warpgroup + 1;
    primitives::arrive_named(kSchedulerBarrier + next, 2 * primitives::kWarpgroupSize);
  }
  // Frees a stage that this warp's products have read.
  SA_DEVICE void release(primitives::Mbarrier* empty) const {
    if (primitives::lane_idx() == 0) primitives::mbarrier_arrive(empty);
  }

  // Computes one work tile. kv_state: the next block's stage in both rings. V lags K by one block.
  SA_DEVICE void attend(typename QRing::PipelineState& q_state,
                        typename KRing::PipelineState& kv_state) {
    RowStates<1> states;
    typename Storage::Output out;
    Results results;
    states.clear();
    out.sum.clear();
    const int count = key_blocks_of(work_tile()).count();
    if (count == 0) {
      results = finish_rows(states);
    } else {
      Accumulators<1, kTilesN> s;
      POperands p;
      float rescale[1][2];

      storage.q_ring.wait_until_full(q_state);
      storage.k_ring.wait_until_full(kv_state);
      primitives::warpgroup_fence_operand(s.c[0]);
      primitives::warpgroup_arrive();
      start_scores(s, q_state.stage, kv_state.stage);
      store_bounds();  // overlaps the product
      Block block = block_of(0);
      primitives::wgmma_wait<0>();
      primitives::warpgroup_fence_operand(s.c[0]);
      release(&storage.k_ring.empty[kv_state.stage]);
      if (count == 1) release(&storage.q_ring.empty[q_state.stage]);
      kv_state.advance();
      softmax_block(s, states, rescale, block);
      Storage::to_operands(s, p);
      storage.v_ring.wait_until_full(kv_state.previous());

      SA_ROLLED
      for (int idx = 1; idx < count; ++idx) {
        storage.k_ring.wait_until_full(kv_state);
        if (Tiles::kUseSchedulerBarrier) warp_scheduler_barrier_sync();
        primitives::warpgroup_fence_operand(s.c[0]);
        out.template start<1>(p, storage.v[kv_state.previous().stage],
                              [&] { start_scores(s, q_state.stage, kv_state.stage); });
        if (Tiles::kUseSchedulerBarrier) warp_scheduler_barrier_arrive();
        block = block_of(idx);
        primitives::wgmma_wait<1>();  // S is complete
        primitives::warpgroup_fence_operand(s.c[0]);
        release(&storage.k_ring.empty[kv_state.stage]);
        if (idx == count - 1) release(&storage.q_ring.empty[q_state.stage]);
        softmax_block(s, states, rescale, block);
        // This block's V, whose load follows that of its K. ptxas hoists the wait for O to the last
        // branch before it. Without the branch of this wait, that would be before the softmax.
        storage.v_ring.wait_until_full(kv_state);
        primitives::wgmma_wait<0>();  // O is complete
        out.finish();
        release(&storage.v_ring.empty[kv_state.previous().stage]);
        kv_state.advance();
        rescale_rows(out.sum, rescale);
        Storage::to_operands(s, p);
      }
      q_state.advance();

      out.template start<0>(p, storage.v[kv_state.previous().stage], [] {});
      results = finish_rows(states);  // overlaps the product
      primitives::wgmma_wait<0>();
      out.finish();
      release(&storage.v_ring.empty[kv_state.previous().stage]);
    }
    store_rows<Out>(out.sum, results.scale, 0, params.out_cols, params.out_is_vectorised,
                    primitives::lane_idx(), [&](int half) { return results.out[half]; });
  }

  SA_DEVICE void start_scores(Accumulators<1, kTilesN>& s, int q_stage, int k_stage) {
    start_abt(s, storage.q[q_stage], warpgroup * 64, storage.k[k_stage], 0, false);
    primitives::wgmma_commit();
  }

  // Stores the window of keys of each of the warp's rows to shared memory; lanes 0 - 15, a row
  // each. The last tile's bounds are no longer read: WorkTileQueue::release has synchronised the
  // warp.
  SA_DEVICE void store_bounds() {
    using primitives::load_shared;
    const int row = warp_row() + primitives::lane_idx();
    if (primitives::lane_idx() < 16) {
      const int row_in_head = load_shared(&work_tile().row_begin) + row;
      const int num_rows = load_shared(&work_tile().num_rows);
      KeyBounds bounds{0, 0};
      if (row_in_head < num_rows) {
        const int qhead_per_khead = params.qhead_per_khead;
        const attention::Mask mask = attention::make_mask(
            params.attn, load_shared(&work_tile().seqlen_q), load_shared(&work_tile().seqlen_k));
        const attention::Range keys = mask.window_keys(row_in_head / qhead_per_khead);
        bounds = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
      }
      primitives::store_shared(storage.bounds + row, bounds);
    }
    primitives::sync_warp();
  }

  // A block of keys as softmax_block needs it; read before the wait for its scores.
  struct Block {
    int first_key;
    bool needs_mask;  // some key is masked for some row
    ScoreScale scale;
  };
  SA_DEVICE Block block_of(int idx) const {
    using primitives::load_shared;
    const int block = key_blocks_of(work_tile()).block(idx);
    const BlockRange& unmasked = work_tile().unmasked[warpgroup];
    const bool needs_mask =
        block < load_shared(&unmasked.begin) || block >= load_shared(&unmasked.end);
    return {block * Tiles::kBlockN, needs_mask, storage.score_scale(params, tile_idx.slot())};
  }

  SA_DEVICE void softmax_block(Accumulators<1, kTilesN>& s, RowStates<1>& states,
                               float (&rescale)[1][2], const Block& block) const {
    transform_scores(s, block.scale.form, block.scale.to_tanh);
    if (block.needs_mask) apply_mask(s, block.first_key);
    online_softmax<Storage::kPShift>(s, states, block.scale.softmax_scale_log2, rescale);
  }

  // Sets the scores of masked keys to -inf.
  SA_DEVICE void apply_mask(Accumulators<1, kTilesN>& s, int first_key) const {
    const int lane = primitives::lane_idx();
    const int first_col = first_key + accumulator_col(lane, 0);
    // num_sink_tokens may exceed seqlen_k, and an int.
    const int64_t seqlen_k = primitives::load_shared(&work_tile().seqlen_k);
    const int sink_end =
        static_cast<int>(attention::min_of(params.attn.num_sink_tokens, seqlen_k)) - first_col;
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const KeyBounds bounds =
          primitives::load_shared(storage.bounds + warp_row() + accumulator_row(lane, 2 * half));
      const int begin = bounds.begin - first_col;
      const int end = bounds.end - first_col;
      SA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        SA_UNROLL
        for (int col = 0; col < 2; ++col) {
          const int key = 8 * n + col;
          if ((key < begin && key >= sink_end) || key >= end) {
            s.c[0][n][2 * half + col] = attention::negative_infinity<float>();
          }
        }
      }
    }
  }

  // The addresses of a lane's two rows of out, null for none, and the factors to scale them with.
  struct Results {
    float scale[2];
    Out* out[2];
  };
  // Folds the sink into the softmax and stores lse.
  SA_DEVICE Results finish_rows(const RowStates<1>& states) const {
    const attention::FlashFwdParams& fwd = params.attn;
    const PackGqa rows = pack_gqa_rows_of(work_tile(), params.qhead_per_khead);
    const int lane = primitives::lane_idx();
    const int first_row = primitives::load_shared(&work_tile().row_begin) + warp_row();
    float sink[2] = {};
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {  // both loads are issued before one is used
      const int row = first_row + accumulator_row(lane, 2 * half);
      if (row < rows.num_rows) sink[half] = load_sink(fwd, rows.head(row));
    }
    Results results;
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      attention::RowState<float> state =
          states.whole(0, half, storage.score_scale(params, tile_idx.slot()).softmax_scale_log2);
      state.max -= static_cast<float>(Storage::kPShift);
      const int row = first_row + accumulator_row(lane, 2 * half);
      results.scale[half] = 0.0f;
      results.out[half] = nullptr;
      if (row >= rows.num_rows) continue;
      const attention::RowResult<float> result = attention::fold_sink(state, sink[half]);
      results.scale[half] = result.scale * storage.out_scale(tile_idx.slot());
      results.out[half] =
          static_cast<Out*>(fwd.out) +
          rows.offset(row, fwd.out_stride_batch, fwd.out_stride_row, fwd.out_stride_head);
      if (lane % 4 == 0) {
        float* lse = static_cast<float*>(fwd.lse) +
                     rows.lse_offset(row, fwd.lse_stride_batch, fwd.lse_stride_head);
        primitives::store_global(lse, result.lse);
      }
    }
    return results;
  }
};

}  // namespace sink_attention::cuda::sm90
