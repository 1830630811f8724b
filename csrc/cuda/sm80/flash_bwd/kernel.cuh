// The backward. A CTA has one block of keys of one kv head. It sums dK and dV of the block over the
// query tiles that see some of it. It adds each tile's dQ to a float32 accumulator, which all CTAs
// share.
//
//   S^T  = K Q^T        P  = exp2(S softmax_scale_log2 - lse_log2)
//   dP^T = V dO^T       dS = P (dP - delta) (softcap's slope)
//   dV  += P^T dO       dK += dS^T Q         dQ += dS K       (softmax_scale is applied at the end)
//
// Keys are the rows of the products, so that P^T and dS^T are operands A in registers. Query rows
// are PackGQA rows (pack_gqa.cuh), so the products also sum over the kv head's query heads. CTAs
// start in the order of device/block_order.h. Each visits its tiles from the last to the first.
//
// The pipeline over tiles with kStages = 2; | is a barrier of the CTA. The copies of a tile's Q,
// dO, lse and delta are in flight for the whole round before it:
//
//     round       j                                     j + 1
//     products    S dP  P dS  dV dK   | dQ              S dP  P dS  dV dK   | dQ
//     copies      .. of j + 1 ........| of j + 2 ...........................| of j + 3 ...
//
// With kStages = 1, tile j + 1 is copied while dQ of tile j is computed. A second barrier follows.
#pragma once

#include "attention/block_list.h"
#include "attention/mask.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm80/flash_bwd/config.h"
#include "cuda/sm80/flash_bwd/differentiate.cuh"
#include "cuda/sm80/flash_bwd/key_block.cuh"
#include "cuda/sm80/flash_bwd/params.h"
#include "cuda/sm80/flash_bwd/storage.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "primitives/atomic.h"
#include "primitives/cta.h"

namespace sink_attention::cuda::sm80 {

// One CTA. The accumulators dk and dv stay in registers from the first tile to the last.
template <class Element, class Tiles>
struct FlashBwdBlock {
  using Storage = FlashBwdStorage<Element, Tiles>;
  using Scores = Accumulators<Tiles::kKeyTiles, Tiles::kWarpRows / 8>;
  using ScoreOperands = OperandsA<Tiles::kKeyTiles, Tiles::kWarpRows / 16>;
  using ValueOperands = OperandsA<Tiles::kKeyTiles, Tiles::kHeadDimV / 16>;
  static constexpr int kThreads = Tiles::kThreads;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kBlockN = Tiles::kBlockN;

  const FlashBwdKernelParams& params;
  Storage& storage;
  const attention::FlashBwdParams& bwd;
  const attention::FlashFwdParams& fwd;
  ValueOperands values;
  Accumulators<Tiles::kKeyTiles, Tiles::kWarpCols / 8> dk;
  Accumulators<Tiles::kKeyTiles, Tiles::kWarpColsV / 8> dv;

  SA_DEVICE FlashBwdBlock(const FlashBwdKernelParams& params, Storage& storage)
      : params(params), storage(storage), bwd(params.bwd), fwd(params.bwd.fwd) {
    if (thread() == 0) init_block_info();
    primitives::sync_threads();  // the block's info is stored
  }

  SA_DEVICE int batch_idx() const { return primitives::load_shared(&storage.batch_idx); }
  SA_DEVICE int kv_head() const { return primitives::load_shared(&storage.kv_head); }
  SA_DEVICE int first_key() const { return primitives::load_shared(&storage.first_key); }
  SA_DEVICE int qhead_per_khead() const { return params.qhead_per_khead; }
  // Tiles [tiles_begin, tiles_end) are visited.
  SA_DEVICE int tiles_begin() const { return primitives::load_shared(&storage.tiles_begin); }
  SA_DEVICE int tiles_end() const { return primitives::load_shared(&storage.tiles_end); }
  SA_DEVICE int seqlen_q() const { return primitives::load_shared(&storage.seqlen_q); }
  SA_DEVICE int seqlen_k() const { return primitives::load_shared(&storage.seqlen_k); }
  SA_DEVICE int64_t workspace_tile(int tile) const {
    return primitives::load_shared(&storage.first_workspace_tile) + tile;
  }
  // Rematerialised at each use, so that no addresses stay in registers until the next tile.
  SA_DEVICE static int thread() { return primitives::rematerialise_thread_idx(); }
  SA_DEVICE static int lane() { return primitives::rematerialise_lane_idx(); }
  SA_DEVICE static int warp() { return thread() / primitives::kWarpSize; }
  SA_DEVICE int num_rows() const { return seqlen_q() * qhead_per_khead(); }
  // Keys of the block that exist. A CTA without keys does nothing.
  SA_DEVICE int num_keys() const {
    return static_cast<int>(attention::min_of(kBlockN, seqlen_k() - first_key()));
  }
  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(fwd, seqlen_q(), seqlen_k());
  }
  // This warp's part of the scores of a tile, and of the columns of dK and dV.
  SA_DEVICE int column_warp() const { return warp() / Tiles::kKeyWarps; }
  SA_DEVICE int warp_row() const { return column_warp() * Tiles::kWarpRows; }
  SA_DEVICE int warp_key() const { return warp() % Tiles::kKeyWarps * 16 * Tiles::kKeyTiles; }

  // Stores the block's info in shared memory. By one thread.
  SA_DEVICE void init_block_info() const {
    const BlockCoord coord = block_coord(params.order, primitives::block_idx().x);
    const PackGqa rows = pack_gqa(fwd, coord.batch_idx, coord.kv_head);
    const int seqlen_q = static_cast<int>(rows.info.seqlen_q);
    const int seqlen_k = static_cast<int>(rows.info.seqlen_k);
    const int first_key = coord.tile_idx * kBlockN;
    const attention::Range queries =
        attention::make_mask(fwd, seqlen_q, seqlen_k)
            .visible_queries(first_key, attention::min_of(first_key + kBlockN, seqlen_k));
    const bool any = queries.begin < queries.end;
    const int first_tile = cuda::first_tile(params.workspace, fwd, coord.batch_idx);
    const int tiles_left = params.workspace.num_tiles - first_tile;
    using primitives::store_shared;
    store_shared(&storage.first_q,
                 static_cast<const Element*>(fwd.q) +
                     rows.offset(0, fwd.q_stride_batch, fwd.q_stride_row, fwd.q_stride_head));
    store_shared(&storage.first_dout, static_cast<const Element*>(bwd.dout) +
                                          rows.offset(0, bwd.dout_stride_batch, bwd.dout_stride_row,
                                                      bwd.dout_stride_head));
    store_shared(&storage.q_is_vectorised, params.q_is_vectorised);
    store_shared(&storage.dout_is_vectorised, params.dout_is_vectorised);
    store_shared(&storage.batch_idx, coord.batch_idx);
    store_shared(&storage.kv_head, coord.kv_head);
    store_shared(&storage.first_key, first_key);
    store_shared(&storage.sink_end,
                 static_cast<int>(attention::min_of(fwd.num_sink_tokens, seqlen_k)) - first_key);
    store_shared(&storage.seqlen_q, seqlen_q);
    store_shared(&storage.seqlen_k, seqlen_k);
    store_shared(&storage.tiles_begin,
                 any ? static_cast<int>(queries.begin) * qhead_per_khead() / kBlockM : 0);
    store_shared(
        &storage.tiles_end,
        any ? static_cast<int>(attention::min_of(
                  (static_cast<int>(queries.end) * qhead_per_khead() + kBlockM - 1) / kBlockM,
                  tiles_left))
            : 0);
    store_shared(&storage.first_workspace_tile,
                 coord.kv_head * params.workspace.num_tiles + first_tile);
  }

  SA_DEVICE void run() {
    if (num_keys() <= 0) return;
    dk.clear();
    dv.clear();
    if (tiles_begin() < tiles_end()) {
      load_block();
      for (int stage = 0; stage < Tiles::kStages; ++stage)
        start_tile(tiles_end() - 1 - stage, stage);
      primitives::cp_async_wait<Tiles::kStages - 1>();
      primitives::sync_threads();  // K, V and the first tile have arrived
      int stage = 0;
      for (int tile = tiles_end() - 1; tile >= tiles_begin(); --tile) {
        add_tile(tile, stage);
        stage ^= Tiles::kStages - 1;
      }
    }
    store_gradients();
  }

  // One round of the pipeline.
  SA_DEVICE void add_tile(int tile, int stage) {
    ScoreOperands p;
    ScoreOperands ds;
    score(tile, stage, p, ds);
    // This stage's dS was last read for dQ kStages rounds ago, before a barrier.
    store_operands_a(ds, storage.ds[stage], warp_key(), warp_row(), lane());
    if constexpr (Tiles::kColumnWarps == 1) {
      gemm_ab(dv, p, storage.dout[stage], 0, lane());
      gemm_ab(dk, ds, storage.q[stage], 0, lane());
    } else {
      store_operands_a(p, storage.p, warp_key(), warp_row(), lane());
      primitives::sync_threads();  // both warps of these keys have stored their halves of P and dS
      gemm_ab(dv, storage.p, warp_key(), storage.dout[stage], column_warp() * Tiles::kWarpColsV,
              lane());
      gemm_ab(dk, storage.ds[stage], warp_key(), storage.q[stage], column_warp() * Tiles::kWarpCols,
              lane());
    }
    if constexpr (Tiles::kStages == 2) primitives::cp_async_wait<0>();
    // All of dS is stored, and with two stages the next tile has arrived. All warps have read this
    // stage's Q and dO, so that start_tile may overwrite them.
    primitives::sync_threads();
    start_tile(tile - Tiles::kStages, stage);
    add_dq(tile, stage);
    if constexpr (Tiles::kStages == 1) {
      primitives::cp_async_wait<0>();
      primitives::sync_threads();  // the next tile has arrived, and all warps have read dS
    }
  }

  SA_DEVICE void score(int tile, int stage, ScoreOperands& p, ScoreOperands& ds) const {
    Scores s;
    Scores dp;
    s.clear();
    dp.clear();
    gemm_abt(s, storage.k, warp_key(), storage.q[stage], warp_row(), lane());
    if constexpr (Tiles::kValuesInRegisters) {
      gemm_abt(dp, values, storage.dout[stage], warp_row(), lane());
    } else {
      gemm_abt(dp, storage.v, warp_key(), storage.dout[stage], warp_row(), lane());
    }
    if (params.has_softcap) {
      differentiate<true, true>(params, storage, stage, warp_key(), warp_row(), lane(), s, dp, p,
                                ds);
    } else if (needs_mask(tile)) {
      differentiate<true, false>(params, storage, stage, warp_key(), warp_row(), lane(), s, dp, p,
                                 ds);
    } else {
      differentiate<false, false>(params, storage, stage, warp_key(), warp_row(), lane(), s, dp, p,
                                  ds);
    }
  }

  // Loads K and V into shared memory, or V through K's buffer into registers. The copies of what
  // stays in shared memory are not waited for.
  SA_DEVICE void load_block() {
    const auto values_at = key_rows(static_cast<const Element*>(fwd.v), fwd.v_stride_batch,
                                    fwd.v_stride_row, fwd.v_stride_head);
    const auto keys_at = key_rows(static_cast<const Element*>(fwd.k), fwd.k_stride_batch,
                                  fwd.k_stride_row, fwd.k_stride_head);
    const int cols_v = static_cast<int>(fwd.head_dim_v);
    if constexpr (Tiles::kValuesInRegisters) {
      static_assert(Tiles::kHeadDimV <= Tiles::kHeadDim, "V goes through K's buffer");
      load_tile<kThreads>(storage.v_in_k_buffer, cols_v, params.v_is_vectorised, values_at,
                          thread());
      primitives::cp_async_commit();
      primitives::cp_async_wait<0>();
      primitives::sync_threads();  // V has arrived
      load_operands_a(values, storage.v_in_k_buffer, warp_key(), lane());
      primitives::sync_threads();  // V is in registers: K may overwrite it
    } else {
      load_tile<kThreads>(storage.v, cols_v, params.v_is_vectorised, values_at, thread());
    }
    load_tile<kThreads>(storage.k, static_cast<int>(fwd.head_dim), params.k_is_vectorised, keys_at,
                        thread());
  }

  // Starts the copies of a tile as one cp.async group, which is empty beyond the last tile. Thread
  // r stores the window of row r.
  SA_DEVICE void start_tile(int tile, int stage) {
    if (tile >= tiles_begin()) {
      const int row_begin = tile * kBlockM;
      const Element* first_q = primitives::load_shared(&storage.first_q);
      const Element* first_dout = primitives::load_shared(&storage.first_dout);
      load_tile<kThreads>(
          storage.q[stage], static_cast<int>(fwd.head_dim),
          primitives::load_shared(&storage.q_is_vectorised),
          [&](int row) {
            return query_row(first_q, row_begin + row, fwd.q_stride_row, fwd.q_stride_head);
          },
          thread());
      load_tile<kThreads>(
          storage.dout[stage], static_cast<int>(fwd.head_dim_v),
          primitives::load_shared(&storage.dout_is_vectorised),
          [&](int row) {
            return query_row(first_dout, row_begin + row, bwd.dout_stride_row,
                             bwd.dout_stride_head);
          },
          thread());
      const int thread = this->thread();
      const int64_t at = workspace_tile(tile) * kBlockM;
      static_assert(kBlockM <= kThreads, "thread r stores the window of row r");
      if (4 * thread < kBlockM) {
        primitives::cp_async_16(storage.lse_log2[stage] + 4 * thread,
                                params.workspace.lse_log2 + at + 4 * thread, true);
        primitives::cp_async_16(storage.delta[stage] + 4 * thread,
                                params.workspace.delta + at + 4 * thread, true);
      }
      if (thread < kBlockM) {
        KeyRange window{0, 0};
        if (row_begin + thread < num_rows()) {
          const attention::Range keys =
              attention::intersect(mask().window_keys((row_begin + thread) / qhead_per_khead()),
                                   {first_key(), first_key() + num_keys()});
          window = {static_cast<int>(keys.begin - first_key()),
                    static_cast<int>(keys.end - first_key())};
        }
        primitives::store_shared(storage.window[stage] + thread, window);
      }
    }
    primitives::cp_async_commit();
  }

  SA_DEVICE const Element* query_row(const Element* base, int row, int64_t stride_row,
                                     int64_t stride_head) const {
    return row < num_rows()
               ? base + row / qhead_per_khead() * stride_row + row % qhead_per_khead() * stride_head
               : nullptr;
  }

  SA_DEVICE int last_position(int tile) const {
    return (static_cast<int>(attention::min_of((tile + 1) * kBlockM, num_rows())) - 1) /
           qhead_per_khead();
  }

  // Whether some key of the block may be masked for some row of the tile. Rows beyond the sequence
  // need no mask, since lse = +inf makes their P 0.
  SA_DEVICE bool needs_mask(int tile) const {
    const int first = tile * kBlockM / qhead_per_khead();
    const int last = last_position(tile);
    const attention::Range unmasked = mask().keys_seen_by_all(first, last + 1);
    return unmasked.begin > first_key() || unmasked.end < first_key() + kBlockN;
  }

  // Adds the tile's dQ to the accumulator. With deterministic=True the dQ semaphore orders the
  // additions by block of keys. A CTA waits only for earlier blocks of its pair. These have lower
  // CTA indices and started earlier (device/block_order.h).
  SA_DEVICE void add_dq(int tile, int stage) const {
    const int warp = this->warp();
    const int row = warp % Tiles::kRowWarps * Tiles::kDqRows;
    const int col = warp / Tiles::kRowWarps * Tiles::kDqCols;
    Accumulators<Tiles::kDqRows / 16, Tiles::kDqCols / 8> dq;
    dq.clear();
    gemm_atb(dq, storage.ds[stage], row, storage.k, col, lane());

    const int64_t at = workspace_tile(tile);
    int* dq_semaphore =
        params.workspace.dq_semaphores == nullptr ? nullptr : params.workspace.dq_semaphores + at;
    const int own_value = dq_semaphore == nullptr ? 0 : dq_semaphore_value(tile);
    if (dq_semaphore != nullptr) {
      if (thread() == 0) primitives::semaphore_wait(dq_semaphore, own_value);
      primitives::sync_threads();  // all earlier blocks have added
    }
    // Neighbouring lanes add to neighbouring floats (bwd_workspace.h).
    float* sums = params.workspace.dq + at * (kBlockM * Tiles::kHeadDim) + lane();
    const int rows_left = num_rows() - tile * kBlockM;
    SA_UNROLL
    for (int m = 0; m < Tiles::kDqRows / 16; ++m) {
      SA_UNROLL
      for (int n = 0; n < Tiles::kDqCols / 8; ++n) {
        if (row + 16 * m >= rows_left || col + 8 * n >= fwd.head_dim) continue;  // padding
        const int fragment = (row / 16 + m) * (Tiles::kHeadDim / 8) + col / 8 + n;
        SA_UNROLL
        for (int reg = 0; reg < 4; ++reg) {
          primitives::atomic_add(sums + fragment * 128 + reg * 32, dq.c[m][n][reg]);
        }
      }
    }
    if (dq_semaphore != nullptr) {
      primitives::sync_threads();  // all threads have added
      if (thread() == 0) primitives::semaphore_release(dq_semaphore, own_value + 1);
    }
  }

  // The semaphore's value at which this block adds: the number of earlier blocks of keys that are
  // visible to the tile.
  SA_DEVICE int dq_semaphore_value(int tile) const {
    const int first = tile * kBlockM / qhead_per_khead();
    const int last = last_position(tile);
    return attention::blocks_of(mask().visible_keys(first, last + 1), kBlockN)
        .index(first_key() / kBlockN);
  }

  SA_DEVICE void store_gradients() {
    primitives::sync_threads();  // the last tile's dQ has read K: dV, then dK overwrite it
    store_gradient<kThreads>(dv, 1.0f, storage.v_in_k_buffer, warp_key(),
                             column_warp() * Tiles::kWarpColsV, thread(),
                             key_rows(static_cast<Element*>(bwd.dv), bwd.dv_stride_batch,
                                      bwd.dv_stride_row, bwd.dv_stride_head),
                             static_cast<int>(fwd.head_dim_v), params.dv_is_vectorised);
    primitives::sync_threads();  // dV has left the buffer
    store_gradient<kThreads>(dk, static_cast<float>(fwd.softmax_scale), storage.k, warp_key(),
                             column_warp() * Tiles::kWarpCols, thread(),
                             key_rows(static_cast<Element*>(bwd.dk), bwd.dk_stride_batch,
                                      bwd.dk_stride_row, bwd.dk_stride_head),
                             static_cast<int>(fwd.head_dim), params.dk_is_vectorised);
  }

  // The rows of the block's keys in a tensor.
  template <class T>
  SA_DEVICE BlockRows<T> key_rows(T* tensor, int64_t stride_batch, int64_t stride_row,
                                  int64_t stride_head) const {
    const attention::SeqlenInfo info = attention::seqlen_info(fwd, batch_idx());
    return {tensor + info.k_batch * stride_batch + (info.k_row + first_key()) * stride_row +
                kv_head() * stride_head,
            stride_row, num_keys()};
  }
};

template <class Element, class Tiles>
struct FlashBwdKernel {
  using Params = FlashBwdKernelParams;
  using Storage = FlashBwdStorage<Element, Tiles>;
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = Tiles::kMinBlocks;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(Storage));
  };
  static_assert(Config::kSharedBytes <= 99 * 1024, "what compute capability 8.6 has for a block");

  static SA_DEVICE void run(const Params& params, char* shared) {
    FlashBwdBlock<Element, Tiles>(params, *reinterpret_cast<Storage*>(shared)).run();
  }
};

}  // namespace sink_attention::cuda::sm80
