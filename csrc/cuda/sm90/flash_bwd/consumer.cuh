// A consumer warpgroup of the backward: dK and dV of its part of the block, and its part of dQ.
//
// Products overlap the arithmetic that does not need them; | is the consumers' barrier:
//
//     products      S   dP .........  dV ...............  |  dQ   dK .............
//     arithmetic        P = exp2(S)   dS = P (dP - delta) |       dQ to its buffer
//
// With 128 rows a warpgroup, registers do not hold P and dS both as floats and as operands. There
// the rows are processed in two halves, 0 and 1:
//
//     products      S   dP of 0   dV of 0 ........   dP of 1   dV of 1 .  |  dQ   dK ..........
//     arithmetic        P of 0    P of 1   dS of 0             dS of 1    |       dQ to its buffer
//
// The next tile's S starts only after this tile is done: nvcc serialises wgmma groups that are in
// flight across a loop's end.
//
// With a softcap P is rounded at once, and P times the softcap's slope replaces S. So dS needs no
// scores. With two halves P of 1 is computed beside dP of 1, for lack of registers.
//
// dS goes through shared memory, and so does P where the consumers share keys. The consumers'
// barrier protects the buffers:
//
//   separate keys  One barrier a tile, after dS. Tile j writes dS into buffer j % 2. A warpgroup
//                  past barrier j + 1 knows that all have finished dQ of tile j, since each waited
//                  for that before it arrived.
//   shared keys    One barrier after P, another after dS. A warpgroup past the first one of tile
//                  j + 1 knows that all have finished dV, dQ and dK of tile j. So it may overwrite
//                  dS, and by tile j + 2 P's buffer j % 2.
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
  using Scores = Accumulators<1, Tiles::kConsumerRows / 8>;
  // The rows of a tile are processed in kParts parts.
  static constexpr int kParts = Tiles::kConsumerRows > 64 ? 2 : 1;
  static constexpr int kPartRows = Tiles::kConsumerRows / kParts;
  static constexpr int kPartTiles = kPartRows / 8;
  using PartScores = Accumulators<1, kPartTiles>;
  using PartOperands = OperandsA<1, kPartTiles / 2>;
  static constexpr int kBarrier = 1;  // the consumers' named barrier

  const FlashBwdKernelParams& params;
  const FlashBwdBlock<Tiles> block;
  Storage& storage;
  const int consumer_idx_;
  Accumulators<1, Tiles::kConsumerCols / 8> dk;
  Accumulators<1, Tiles::kConsumerColsV / 8> dv;

  SA_DEVICE FlashBwdConsumer(const FlashBwdKernelParams& params, Storage& storage, int consumer_idx)
      : params(params),
        block{params, storage.info},
        storage(storage),
        consumer_idx_(consumer_idx) {}

  SA_DEVICE void run() {
    // Each branch stores by itself: no registers have to agree where the branches join.
    if (block.tiles_begin() >= block.tiles_end()) {
      dk.clear();
      dv.clear();
      store_gradients();
    } else if (params.has_softcap) {
      run_tiles_of_block<true>();
      store_gradients();
    } else {
      run_tiles_of_block<false>();
      store_gradients();
    }
  }

 private:
  // Recomputed in each step, so that addresses occupy no registers between tiles.
  SA_DEVICE static int lane() { return primitives::rematerialise_lane_idx(); }
  SA_DEVICE static int warp() {  // of the warpgroup
    return primitives::rematerialise_thread_idx() / primitives::kWarpSize % 4;
  }
  // This warpgroup among the consumers: 0 or 1. The optimisation barrier makes operand descriptors
  // be recomputed where they are used.
  SA_DEVICE int consumer_idx() const { return primitives::optimisation_barrier(consumer_idx_); }
  // This warpgroup's first key of the block, and below its first row of a tile and first columns.
  SA_DEVICE int first_key() const {
    return Tiles::kSharesKeys ? primitives::optimisation_barrier(0) : consumer_idx() * 64;
  }
  // The lane's first key of the block. Its other key is 8 further.
  SA_DEVICE int lane_key() const { return first_key() + 16 * warp() + accumulator_row(lane(), 0); }
  SA_DEVICE int first_row() const {
    return Tiles::kSharesKeys ? consumer_idx() * Tiles::kConsumerRows : 0;
  }
  SA_DEVICE int first_col() const {
    return Tiles::kSharesKeys ? consumer_idx() * Tiles::kConsumerCols : 0;
  }
  SA_DEVICE int first_col_v() const {
    return Tiles::kSharesKeys ? consumer_idx() * Tiles::kConsumerColsV : 0;
  }

  template <bool kSoftcap>
  SA_DEVICE void run_tiles_of_block() {
    if constexpr (Tiles::kDividesDqRows) {
      run_tiles<kSoftcap, Tiles::kDqCols0>(64 * consumer_idx_, 0);
    } else if constexpr (Tiles::kDqCols0 == Tiles::kDqCols1) {
      run_tiles<kSoftcap, Tiles::kDqCols0>(0, Tiles::kDqCols0 * consumer_idx_);
    } else if (consumer_idx_ == 0) {
      run_tiles<kSoftcap, Tiles::kDqCols0>(0, 0);
    } else {
      run_tiles<kSoftcap, Tiles::kDqCols1>(0, Tiles::kDqCols0);
    }
  }

  // This warpgroup's part of dQ is 64 rows x kDqCols.
  template <bool kSoftcap, int kDqCols>
  SA_DEVICE void run_tiles(int dq_row, int dq_col) {
    const int tiles = block.tiles_end() - block.tiles_begin();
    primitives::mbarrier_wait(&storage.k_full, 0);
    primitives::mbarrier_wait(&storage.v_full, 0);
    for (int i = 0; i < tiles; ++i) process_tile<kSoftcap, kDqCols>(i, dq_row, dq_col);
  }

  // Processes the i-th visited tile.
  template <bool kSoftcap, int kDqCols>
  SA_DEVICE void process_tile(int i, int dq_row, int dq_col) {
    const int stage = primitives::optimisation_barrier(i % Tiles::kStages);
    Scores s;
    PartScores dp[kParts];
    storage.q_ring.wait_until_full(pipeline_state<Tiles::kStages>(i));
    primitives::warpgroup_arrive();
    start_abt(s, storage.k, first_key(), storage.q[stage].tile, first_row(), false);
    primitives::wgmma_commit();
    storage.dout_ring.wait_until_full(pipeline_state<Tiles::kStages>(i));
    start_dp<0>(dp[0], stage);

    PartOperands p[kParts];
    PartOperands ds[kParts];
    const bool masked = primitives::load_shared(&storage.is_masked[stage]) != 0;
    primitives::wgmma_wait<1>();
    primitives::warpgroup_fence_operand(s.c[0]);
    recompute_p<kSoftcap, 0>(s, p[0], stage, masked);
    start_dv<0>(p, stage, i);
    if constexpr (kParts == 2 && !kSoftcap) recompute_p<kSoftcap, 1>(s, p[1], stage, masked);
    primitives::wgmma_wait<1>();
    differentiate<0>(s, dp[0], stage, masked);
    to_operands<Element>(dp[0], ds[0].a[0]);
    if constexpr (kParts == 2) {
      start_dp<1>(dp[1], stage);
      if constexpr (kSoftcap) recompute_p<kSoftcap, 1>(s, p[1], stage, masked);
      start_dv<1>(p, stage, i);
      primitives::wgmma_wait<1>();
      differentiate<1>(s, dp[1], stage, masked);
      to_operands<Element>(dp[1], ds[1].a[0]);
    }

    auto& ds_tile = storage.scores[Tiles::kSharesKeys ? 0 : i % 2].tile;
    store_scores(ds, ds_tile);
    Accumulators<1, kDqCols / 8> dq;
    primitives::warpgroup_arrive();
    start_atb(dq, ds_tile, dq_row, storage.k, dq_col, false);
    primitives::wgmma_commit();
    if constexpr (Tiles::kSharesKeys) {
      start_ab(dk, ds_tile, 0, storage.q[stage].tile, first_col(), i > 0);
    } else {
      SA_UNROLL
      for (int part = 0; part < kParts; ++part) {
        start_ab(dk, ds[part].a[0], storage.q[stage].tile, part * kPartRows, 0, part > 0 || i > 0);
      }
    }
    primitives::wgmma_commit();

    primitives::wgmma_wait<2>();
    primitives::warpgroup_fence_operand(dv.c[0]);
    release(storage.dout_ring, stage);
    primitives::wgmma_wait<1>();
    primitives::warpgroup_fence_operand(dq.c[0]);
    store_dq(dq, dq_row, dq_col, i);
    primitives::wgmma_wait<0>();
    primitives::warpgroup_fence_operand(dk.c[0]);
    release(storage.q_ring, stage);
  }

  // The steps of part kPart of a tile's rows follow.

  template <int kPart>
  SA_DEVICE int part_row() const {
    return first_row() + kPart * kPartRows;
  }

  template <int kPart>
  SA_DEVICE void start_dp(PartScores& dp, int stage) const {
    primitives::warpgroup_arrive();
    start_abt(dp, storage.v, first_key(), storage.dout[stage].tile, part_row<kPart>(), false);
    primitives::wgmma_commit();
  }

  // Computes P as operands, and replaces S by the slopes that differentiate() takes.
  template <bool kSoftcap, int kPart>
  SA_DEVICE void recompute_p(Scores& s, PartOperands& p, int stage, bool masked) const {
    constexpr int kFirst = kPart * kPartTiles;
    const int row = part_row<kPart>();
    const float* lse_log2 = storage.lse_log2[stage] + row;
    const KeyRange* window = storage.window[stage] + row;
    if constexpr (kSoftcap) {
      SA_UNROLL
      for (int k = 0; k < kPartTiles / 2; ++k) {
        Accumulators<1, 2> probabilities;
        to_softcap_probabilities(s, kFirst + 2 * k, probabilities, lse_log2 + 16 * k,
                                 params.softmax_scale_log2, params.to_tanh, lane());
        if (masked) zero_masked_keys<0, 2>(probabilities, window + 16 * k);
        to_operand_a<Element>(probabilities, 0, 0, p.a[0][k]);
      }
    } else {
      to_probabilities<kFirst, kPartTiles>(s, lse_log2, params.softmax_scale_log2, lane());
      if (masked) zero_masked_keys<kFirst, kPartTiles>(s, window);
      SA_UNROLL
      for (int k = 0; k < kPartTiles / 2; ++k) {
        to_operand_a<Element>(s, 0, kFirst / 2 + k, p.a[0][k]);
      }
    }
  }

  template <int kPart>
  SA_DEVICE void differentiate(const Scores& slopes, PartScores& dp, int stage, bool masked) const {
    const int row = part_row<kPart>();
    primitives::warpgroup_fence_operand(dp.c[0]);
    to_gradients<kPart * kPartTiles>(slopes, dp, storage.delta[stage] + row, lane());
    if (masked) zero_masked_keys<0, kPartTiles>(dp, storage.window[stage] + row);
  }

  template <int kFirst, int kTilesN, class AnyScores>
  SA_DEVICE void zero_masked_keys(AnyScores& elements, const KeyRange* window) const {
    zero_masked<kFirst, kTilesN>(elements, window, block.sink_end(), lane_key(), lane());
  }

  // Starts dV += P^T dO. P^T is in `p`, or goes through shared memory.
  template <int kPart>
  SA_DEVICE void start_dv(PartOperands (&p)[kParts], int stage, int i) {
    const auto& dout = storage.dout[stage].tile;
    if constexpr (Tiles::kSharesKeys) {
      auto& p_tile = storage.scores[Storage::kTilesDs + i % 2].tile;
      store_scores(p, p_tile);
      primitives::warpgroup_arrive();
      start_ab(dv, p_tile, 0, dout, first_col_v(), i > 0);
    } else {
      primitives::warpgroup_arrive();
      start_ab(dv, p[kPart].a[0], dout, kPart * kPartRows, 0, kPart > 0 || i > 0);
    }
    primitives::wgmma_commit();
  }

  // Stores this warpgroup's part of P or dS. After its barrier the tile is complete.
  SA_DEVICE void store_scores(PartOperands (&parts)[kParts],
                              typename Storage::ScoreTile& tile) const {
    SA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      store_operands_a(parts[part], tile, first_key() + 16 * warp(), first_row() + part * kPartRows,
                       lane());
    }
    primitives::fence_proxy_async();
    primitives::sync_named(kBarrier, Tiles::kConsumerThreads);
  }

  // Stores dQ in fragment order: elements of adjacent lanes are adjacent (bwd_workspace.h).
  template <int kTilesN>
  SA_DEVICE void store_dq(const Accumulators<1, kTilesN>& dq, int row, int col, int i) {
    storage.dq_ring.wait_until_empty(pipeline_state<1>(i));
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

  // Frees a stage that the warp has read.
  SA_DEVICE void release(Ring<Tiles::kStages>& ring, int stage) const {
    primitives::sync_warp();
    if (lane() == 0) primitives::mbarrier_arrive(&ring.empty[stage]);
  }
  SA_DEVICE void store_gradients() const {
    const attention::FlashBwdParams& bwd = params.bwd;
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
