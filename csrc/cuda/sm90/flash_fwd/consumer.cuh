// A warpgroup that computes: 64 rows of the block's tile, against the tile's blocks of keys.
//
// With S = Q K^T and O += P V, of block j of n:
//
//     products   S 0 | S 1, O 0 | S 2, O 1 | ... | S n - 1, O n - 2 | O n - 1
//     softmax          of S 0     of S 1     ...                of S n - 1
//
// so the softmax of a block runs beside the product of the weights before it, and, where
// warpgroups take turns, beside the other warpgroups' products: whose turn it is starts its two
// products and passes the turn on. (float8: O j - 1's first columns before S j, the others behind;
// flash_fwd_fp8/output.cuh.)
//
// A thread owns rows accumulator_row(lane, 0) and 8 below of its warp's 16, two neighbouring
// columns of every 8.
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
  // The weights of a block, as operands.
  using Weights = uint32_t[Tiles::kBlockN / Storage::kStepKeys][4];
  static constexpr int kFirstTurn = 1;  // the barrier of warpgroup 0's turn

  const FlashFwdKernelParams& params;
  Storage& storage;
  int warpgroup;
  int warp;  // of the block
  WorkPlace work_at{};

  SA_DEVICE void run() {
    if (Tiles::kUseSchedulerBarrier && warpgroup == Tiles::kConsumers - 1)
      warp_scheduler_barrier_arrive();  // the first
    typename QRing::Place q_at;
    typename KRing::Place at;
    for (; storage.works.wait_for(work_at); storage.works.release(work_at)) attend(q_at, at);
    if (Tiles::kUseSchedulerBarrier && warpgroup == 0)
      warp_scheduler_barrier_sync();  // nobody is left to take the last
  }

 private:
  SA_DEVICE const Work<Tiles::kConsumers>& work() const {
    return storage.works.work[work_at.slot()];
  }
  SA_DEVICE int warp_row() const { return 16 * warp; }  // in the tile
  // Of a turn's barrier one warpgroup waits, and the one before it arrives.
  SA_DEVICE void warp_scheduler_barrier_sync() const {
    primitives::sync_named(kFirstTurn + warpgroup, 2 * primitives::kWarpgroupSize);
  }
  SA_DEVICE void warp_scheduler_barrier_arrive() const {
    const int next = warpgroup == Tiles::kConsumers - 1 ? 0 : warpgroup + 1;
    primitives::arrive_named(kFirstTurn + next, 2 * primitives::kWarpgroupSize);
  }
  // What this warp's products have read may be overwritten.
  SA_DEVICE void release(primitives::Mbarrier* empty) const {
    if (primitives::lane_idx() == 0) primitives::mbarrier_arrive(empty);
  }

  // `at`: the next block's place in both rings. V is used a block later than K.
  SA_DEVICE void attend(typename QRing::Place& q_at, typename KRing::Place& at) {
    RowStates<1> states;
    typename Storage::Output out;
    Results results;
    states.clear();
    out.sum.clear();
    const int count = blocks_of_work(work()).count();
    if (count == 0) {
      results = finish_rows(states);
    } else {
      Accumulators<1, kTilesN> s;
      Weights p;
      float rescale[1][2];

      storage.q_ring.wait_until_full(q_at);
      storage.k_ring.wait_until_full(at);
      primitives::warpgroup_fence_operand(s.c[0]);
      primitives::warpgroup_arrive();
      start_scores(s, q_at.stage, at.stage);
      store_bounds();  // beside the product
      Block block = block_of(0);
      primitives::wgmma_wait<0>();
      primitives::warpgroup_fence_operand(s.c[0]);
      release(&storage.k_ring.empty[at.stage]);
      if (count == 1) release(&storage.q_ring.empty[q_at.stage]);
      at.advance();
      soften_block(s, states, rescale, block);
      Storage::to_operands(s, p);
      storage.v_ring.wait_until_full(at.previous());

      SA_ROLLED
      for (int idx = 1; idx < count; ++idx) {
        storage.k_ring.wait_until_full(at);
        if (Tiles::kUseSchedulerBarrier) warp_scheduler_barrier_sync();
        primitives::warpgroup_fence_operand(s.c[0]);
        out.template start<1>(p, storage.v[at.previous().stage],
                              [&] { start_scores(s, q_at.stage, at.stage); });
        if (Tiles::kUseSchedulerBarrier) warp_scheduler_barrier_arrive();
        block = block_of(idx);
        primitives::wgmma_wait<1>();  // the scores are there
        primitives::warpgroup_fence_operand(s.c[0]);
        release(&storage.k_ring.empty[at.stage]);
        if (idx == count - 1) release(&storage.q_ring.empty[q_at.stage]);
        soften_block(s, states, rescale, block);
        // This block's values, asked for behind its keys. ptxas moves the wait for the output up to
        // the last branch before it, in front of the softmax if there were none here.
        storage.v_ring.wait_until_full(at);
        primitives::wgmma_wait<0>();  // the output is
        out.finish();
        release(&storage.v_ring.empty[at.previous().stage]);
        at.advance();
        rescale_rows(out.sum, rescale);
        Storage::to_operands(s, p);
      }
      q_at.advance();

      out.template start<0>(p, storage.v[at.previous().stage], [] {});
      results = finish_rows(states);  // beside the product
      primitives::wgmma_wait<0>();
      out.finish();
      release(&storage.v_ring.empty[at.previous().stage]);
    }
    store_rows<Out>(out.sum, results.scale, 0, params.out_cols, params.out_is_vectorised,
                    primitives::lane_idx(), [&](int half) { return results.out[half]; });
  }

  SA_DEVICE void start_scores(Accumulators<1, kTilesN>& s, int q_stage, int k_stage) {
    start_abt(s, storage.q[q_stage], warpgroup * 64, storage.k[k_stage], 0, false);
    primitives::wgmma_commit();
  }

  // Leaves in shared memory which keys each of the warp's rows sees; lanes 0 - 15 a row each. Since
  // the last work's were read the warp has met in WorkQueue::release.
  SA_DEVICE void store_bounds() {
    using primitives::load_shared;
    const int row = warp_row() + primitives::lane_idx();
    if (primitives::lane_idx() < 16) {
      const int packed_row = load_shared(&work().row_begin) + row;
      const int num_rows = load_shared(&work().num_rows);
      KeyBounds bounds{0, 0};
      if (packed_row < num_rows) {
        const int qhead_per_khead = params.qhead_per_khead;
        const attention::Mask mask = attention::make_mask(
            params.attn, load_shared(&work().seqlen_q), load_shared(&work().seqlen_k));
        const attention::Range keys = mask.window_keys(packed_row / qhead_per_khead);
        bounds = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
      }
      primitives::store_shared(storage.bounds + row, bounds);
    }
    primitives::sync_warp();
  }

  // What soften_block must know of a block of keys: read before the wait for its scores.
  struct Block {
    int first_key;
    bool hides;  // some key from some row
    ScoreScale scale;
  };
  SA_DEVICE Block block_of(int idx) const {
    using primitives::load_shared;
    const int block = blocks_of_work(work()).block(idx);
    const BlockRange& full = work().full[warpgroup];
    const bool hides = block < load_shared(&full.begin) || block >= load_shared(&full.end);
    return {block * Tiles::kBlockN, hides, storage.score_scale(params, work_at.slot())};
  }

  SA_DEVICE void soften_block(Accumulators<1, kTilesN>& s, RowStates<1>& states,
                              float (&rescale)[1][2], const Block& block) const {
    transform_scores(s, block.scale.form, block.scale.to_tanh);
    if (block.hides) hide_scores(s, block.first_key);
    online_softmax<Storage::kWeightShift>(s, states, block.scale.softmax_scale_log2, rescale);
  }

  // Scores of keys that a row does not see become -inf.
  SA_DEVICE void hide_scores(Accumulators<1, kTilesN>& s, int first_key) const {
    const int lane = primitives::lane_idx();
    const int first_col = first_key + accumulator_col(lane, 0);
    // Any number of them may be asked for.
    const int64_t seqlen_k = primitives::load_shared(&work().seqlen_k);
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

  // Where a lane's rows of out go, null for none, and what they are to be multiplied with.
  struct Results {
    float scale[2];
    Out* out[2];
  };
  // Folds the sink in and writes lse.
  SA_DEVICE Results finish_rows(const RowStates<1>& states) const {
    const attention::FlashFwdParams& fwd = params.attn;
    const PackGqa rows = rows_of_work(work(), params.qhead_per_khead);
    const int lane = primitives::lane_idx();
    const int first_row = primitives::load_shared(&work().row_begin) + warp_row();
    float sink[2] = {};
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {  // both are asked for before one is used
      const int row = first_row + accumulator_row(lane, 2 * half);
      if (row < rows.num_rows) sink[half] = load_sink(fwd, rows.head(row));
    }
    Results results;
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      attention::RowState<float> state =
          states.whole(0, half, storage.score_scale(params, work_at.slot()).softmax_scale_log2);
      state.max -= static_cast<float>(Storage::kWeightShift);
      const int row = first_row + accumulator_row(lane, 2 * half);
      results.scale[half] = 0.0f;
      results.out[half] = nullptr;
      if (row >= rows.num_rows) continue;
      const attention::RowResult<float> result = attention::fold_sink(state, sink[half]);
      results.scale[half] = result.scale * storage.out_scale(work_at.slot());
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
