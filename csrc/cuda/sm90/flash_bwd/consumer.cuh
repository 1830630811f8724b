// A warpgroup that multiplies: dK and dV of its part of a backward block, and its part of dQ.
//
// Products run beside the arithmetic that does not need them; | is the barrier of the consumers:
//
//     products      S   dP .........  dV ...............  |  dQ   dK .............
//     arithmetic        P = exp2(S)   dS = P (dP - delta) |       dQ to its buffer
//
// The next tile's S does not start before: nvcc serialises products that run over a loop's end.
//
// dS, and P where two warpgroups share keys, pass through shared memory, and so all consumers wait
// for each other:
//
//   apart    one barrier a tile, after dS. Tile j writes dS into buffer j % 2. Whoever has passed
//            barrier j + 1 knows that all are done with dQ of tile j: they waited for it before.
//   sharing  one barrier after P, another after dS. Whoever has passed the first of tile j + 1
//            knows that all are done with dV, dQ and dK of tile j: dS may be overwritten, and, by
//            tile j + 2, P's buffer j % 2.
#pragma once

#include "cuda/sm90/flash_bwd/block.cuh"
#include "cuda/sm90/flash_bwd/differentiate.cuh"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/sm90/operands.cuh"
#include "cuda/sm90/store_rows.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "primitives/bulk.h"
#include "primitives/cta.h"
#include "primitives/warp.h"
#include "primitives/warpgroup.h"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashBwdConsumer {
  using Storage = FlashBwdStorage<Element, Tiles>;
  using Scores = Accumulators<1, Tiles::kGroupRows / 8>;
  using ScoreOperands = OperandsA<1, Tiles::kGroupRows / 16>;
  static constexpr int kBarrier = 1;  // the consumers' named barrier

  const FlashBwdKernelProblem& problem;
  const FlashBwdBlock<Tiles> block;
  Storage& storage;
  const int own_group;
  Accumulators<1, Tiles::kGroupCols / 8> dk;
  Accumulators<1, Tiles::kGroupColsV / 8> dv;

  SA_DEVICE FlashBwdConsumer(const FlashBwdKernelProblem& problem, Storage& storage, int group)
      : problem(problem), block{problem, storage.info}, storage(storage), own_group(group) {}

  SA_DEVICE void run() {
    // Each stores by itself, so that no registers must agree where the branches meet.
    if (block.tiles_begin() >= block.tiles_end()) {
      dk.clear();
      dv.clear();
      store_gradients();
    } else if (problem.capped) {
      walk<true>();
      store_gradients();
    } else {
      walk<false>();
      store_gradients();
    }
  }

 private:
  // Anew in each step, so that no step's addresses wait in registers for the next tile.
  SA_DEVICE static int lane() { return primitives::lane_idx_anew(); }
  SA_DEVICE static int warp() {  // of the warpgroup
    return primitives::thread_idx_anew() / primitives::kWarpSize % 4;
  }
  // Of the consumers: 0 or 1. Descriptors of operands are computed from it where they are needed.
  SA_DEVICE int group() const { return primitives::opaque(own_group); }
  // Of the block's keys and columns, and of a tile's rows, this warpgroup's first.
  SA_DEVICE int first_key() const {
    return Tiles::kSharesKeys ? primitives::opaque(0) : group() * 64;
  }
  // Of the block's keys, the lane's first; the other is 8 further.
  SA_DEVICE int lane_key() const { return first_key() + 16 * warp() + accumulator_row(lane(), 0); }
  SA_DEVICE int first_row() const { return Tiles::kSharesKeys ? group() * Tiles::kGroupRows : 0; }
  SA_DEVICE int first_col() const { return Tiles::kSharesKeys ? group() * Tiles::kGroupCols : 0; }
  SA_DEVICE int first_col_v() const {
    return Tiles::kSharesKeys ? group() * Tiles::kGroupColsV : 0;
  }

  template <bool kCapped>
  SA_DEVICE void walk() {
    if constexpr (Tiles::kDividesDqRows) {
      walk_tiles<kCapped, Tiles::kDqCols0>(64 * own_group, 0);
    } else if constexpr (Tiles::kDqCols0 == Tiles::kDqCols1) {
      walk_tiles<kCapped, Tiles::kDqCols0>(0, Tiles::kDqCols0 * own_group);
    } else if (own_group == 0) {
      walk_tiles<kCapped, Tiles::kDqCols0>(0, 0);
    } else {
      walk_tiles<kCapped, Tiles::kDqCols1>(0, Tiles::kDqCols0);
    }
  }

  // This warpgroup's part of dQ is 64 rows x kDqCols.
  template <bool kCapped, int kDqCols>
  SA_DEVICE void walk_tiles(int dq_row, int dq_col) {
    const int tiles = block.tiles_end() - block.tiles_begin();
    primitives::mbarrier_wait(&storage.k_full, 0);
    primitives::mbarrier_wait(&storage.v_full, 0);
    for (int i = 0; i < tiles; ++i) add_tile<kCapped, kDqCols>(i, dq_row, dq_col);
  }

  // The i-th tile that is visited.
  template <bool kCapped, int kDqCols>
  SA_DEVICE void add_tile(int i, int dq_row, int dq_col) {
    constexpr bool kEarlyValues = Tiles::kEarlyValues && !kCapped;
    const int stage = primitives::opaque(i % Tiles::kStages);
    Scores s;
    Scores dp;
    storage.q_ring.wait_until_full(place<Tiles::kStages>(i));
    primitives::wgmma_fence();
    start_abt(s, storage.k, first_key(), storage.q[stage].tile, first_row(), false);
    primitives::wgmma_commit();
    storage.dout_ring.wait_until_full(place<Tiles::kStages>(i));
    primitives::wgmma_fence();
    start_abt(dp, storage.v, first_key(), storage.dout[stage].tile, first_row(), false);
    primitives::wgmma_commit();

    ScoreOperands p;
    ScoreOperands ds;
    const bool masked = primitives::load_shared(&storage.is_masked[stage]) != 0;
    if constexpr (kEarlyValues) {
      primitives::wgmma_wait<1>();
      primitives::wgmma_hold(s.c[0]);
      to_weights(s, storage.lse_log2[stage] + first_row(), problem.to_log2, lane());
      if (masked) hide_unseen(s, stage);
      to_operands<Element>(s, p.a[0]);
      start_values(p, i);
      primitives::wgmma_wait<1>();
      primitives::wgmma_hold(dp.c[0]);
      to_gradients(s, dp, storage.delta[stage] + first_row(), lane());
      if (masked) hide_unseen(dp, stage);
      to_operands<Element>(dp, ds.a[0]);
    } else {
      primitives::wgmma_wait<0>();
      primitives::wgmma_hold(s.c[0]);
      primitives::wgmma_hold(dp.c[0]);
      if (masked) {
        differentiate<true, kCapped>(s, dp, stage, p, ds);
      } else {
        differentiate<false, kCapped>(s, dp, stage, p, ds);
      }
      start_values(p, i);
    }
    auto& ds_tile = storage.scores[Tiles::kSharesKeys ? 0 : i % 2].tile;
    leave_scores(ds, ds_tile);
    Accumulators<1, kDqCols / 8> dq;
    primitives::wgmma_fence();
    start_atb(dq, ds_tile, dq_row, storage.k, dq_col, false);
    primitives::wgmma_commit();
    if constexpr (Tiles::kSharesKeys) {
      start_ab(dk, ds_tile, 0, storage.q[stage].tile, first_col(), i > 0);
    } else {
      start_ab(dk, ds.a[0], storage.q[stage].tile, 0, 0, i > 0);
    }
    primitives::wgmma_commit();

    primitives::wgmma_wait<2>();
    primitives::wgmma_hold(dv.c[0]);
    release(storage.dout_ring, stage);
    primitives::wgmma_wait<1>();
    primitives::wgmma_hold(dq.c[0]);
    leave_dq(dq, dq_row, dq_col, i);
    primitives::wgmma_wait<0>();
    primitives::wgmma_hold(dk.c[0]);
    release(storage.q_ring, stage);
  }

  template <int kStages>
  SA_DEVICE static typename Ring<kStages>::Place place(int i) {
    return {i % kStages, i / kStages % 2};
  }

  SA_DEVICE void hide_unseen(Scores& numbers, int stage) const {
    hide(numbers, storage.window[stage] + first_row(), block.sink_end(), lane_key(), lane());
  }

  template <bool kMasked, bool kCapped>
  SA_DEVICE void differentiate(const Scores& s, const Scores& dp, int stage, ScoreOperands& p,
                               ScoreOperands& ds) const {
    to_operands_of_both<kMasked, kCapped, Element>(
        s, dp, storage.lse_log2[stage] + first_row(), storage.delta[stage] + first_row(),
        problem.to_log2, problem.to_tanh, storage.window[stage] + first_row(),
        kMasked ? block.sink_end() : 0, lane_key(), lane(), p, ds);
  }

  // dV += P^T dO, of which P^T stays in `p` or goes through shared memory.
  SA_DEVICE void start_values(ScoreOperands& p, int i) {
    if constexpr (Tiles::kSharesKeys) {
      auto& p_tile = storage.scores[Storage::kTilesDs + i % 2].tile;
      leave_scores(p, p_tile);
      primitives::wgmma_fence();
      start_ab(dv, p_tile, 0, storage.dout[i % Tiles::kStages].tile, first_col_v(), i > 0);
    } else {
      primitives::wgmma_fence();
      start_ab(dv, p.a[0], storage.dout[i % Tiles::kStages].tile, 0, 0, i > 0);
    }
    primitives::wgmma_commit();
  }

  // Writes this warpgroup's part of a tile of scores; after it all of the tile is there.
  SA_DEVICE void leave_scores(ScoreOperands& operands, typename Storage::ScoreTile& tile) const {
    store_operands_a(operands, tile, first_key() + 16 * warp(), first_row(), lane());
    primitives::fence_proxy_async();
    primitives::sync_named(kBarrier, Tiles::kConsumerThreads);
  }

  // Numbers of neighbouring lanes are neighbours (bwd_workspace.h).
  template <int kTilesN>
  SA_DEVICE void leave_dq(const Accumulators<1, kTilesN>& dq, int row, int col, int i) {
    storage.dq_ring.wait_until_empty(place<1>(i));
    const int fragment = (row / 16 + warp()) * (Tiles::kHeadDim / 8) + col / 8;
    float* to = storage.dq + fragment * 128 + lane();
    SA_UNROLL
    for (int n = 0; n < kTilesN; ++n) {
      SA_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        primitives::store_shared(to + n * 128 + reg * 32, dq.c[0][n][reg]);
      }
    }
    primitives::fence_proxy_async();
    primitives::sync_warp();
    if (lane() == 0) primitives::mbarrier_arrive(&storage.dq_ring.full[0]);
  }

  // The warp is done with a stage.
  SA_DEVICE void release(Ring<Tiles::kStages>& ring, int stage) const {
    primitives::sync_warp();
    if (lane() == 0) primitives::mbarrier_arrive(&ring.empty[stage]);
  }
  SA_DEVICE void store_gradients() const {
    const attention::FlashBwdProblem& bwd = problem.bwd;
    store_gradient(dv, 1.0f, first_col_v(), bwd.dv, bwd.dv_stride_batch, bwd.dv_stride_row,
                   bwd.dv_stride_head, bwd.fwd.head_dim_v);
    store_gradient(dk, static_cast<float>(bwd.fwd.softmax_scale), first_col(), bwd.dk,
                   bwd.dk_stride_batch, bwd.dk_stride_row, bwd.dk_stride_head, bwd.fwd.head_dim);
  }

  template <int kTilesN>
  SA_DEVICE void store_gradient(const Accumulators<1, kTilesN>& gradient, float scale, int col,
                                void* tensor, int64_t stride_batch, int64_t stride_row,
                                int64_t stride_head, int64_t cols) const {
    const attention::SeqlenInfo info = attention::seqlen_info(block.fwd(), block.batch_idx());
    Element* first = static_cast<Element*>(tensor) + info.k_batch * stride_batch +
                     (info.k_row + block.first_key()) * stride_row + block.kv_head() * stride_head;
    const int key = lane_key();
    const int num_keys = block.num_keys();
    store_rows<Element>(gradient, {scale, scale}, col, static_cast<int>(cols), true, lane(),
                        [&](int half) -> Element* {
                          const int row = key + 8 * half;
                          return row < num_keys ? first + row * stride_row : nullptr;
                        });
  }
};

}  // namespace sink_attention::cuda::sm90
