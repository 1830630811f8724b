// The producer warp. Tile by tile it loads Q, then K and V of the tile's key blocks in turn, as far
// ahead as the rings have room.
#pragma once

#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashFwdProducer {
  using Storage = FlashFwdStorage<Element, Tiles>;
  using QRing = Ring<Tiles::kQueryStages>;
  using KRing = Ring<Tiles::kStages>;

  const FlashFwdKernelParams& params;
  Storage& storage;
  WorkTileIndex tile_idx{};

  SA_DEVICE void run() {
    if (primitives::lane_idx() == 0) prefetch_maps();
    typename QRing::PipelineState q_state;
    typename KRing::PipelineState kv_state;
    for (; storage.work_tiles.wait_for(tile_idx); storage.work_tiles.release(tile_idx)) {
      const int count = key_blocks_of(work_tile()).count();
      if (count > 0) load_work_tile(count, q_state, kv_state);
    }
    wait_for_consumers(q_state, kv_state);
  }

 private:
  SA_DEVICE void prefetch_maps() const {
    if (params.q_uses_tma) primitives::prefetch_tensor_map(&params.q_map);
    if (params.k_uses_tma) primitives::prefetch_tensor_map(&params.k_map);
    if (params.v_uses_tma) primitives::prefetch_tensor_map(&params.v_map);
  }

  SA_DEVICE const WorkTileInfo<Tiles::kConsumers>& work_tile() const {
    return storage.work_tiles.tile[tile_idx.slot()];
  }

  SA_DEVICE void load_work_tile(int count, typename QRing::PipelineState& q_state,
                                typename KRing::PipelineState& kv_state) {
    SA_ROLLED
    for (int idx = 0; idx < count; ++idx) {
      storage.k_ring.wait_until_empty(kv_state);
      primitives::Mbarrier* k_full = &storage.k_ring.full[kv_state.stage];
      const bool has_arrived = start_load<false>(storage.k[kv_state.stage], idx, k_full);
      if (idx == 0) {  // behind the first keys, since Q's stage becomes empty later than K's
        storage.q_ring.wait_until_empty(q_state);
        load_queries(storage.q[q_state.stage], &storage.q_ring.full[q_state.stage]);
      }
      if (!has_arrived) finish_cp_async(k_full);
      storage.loaded_v_ring().wait_until_empty(kv_state);
      primitives::Mbarrier* v_full = &storage.loaded_v_ring().full[kv_state.stage];
      if (!start_load<true>(storage.loaded_v(kv_state.stage), idx, v_full)) finish_cp_async(v_full);
      kv_state.advance();
    }
    q_state.advance();
  }

  // start_load_keys for key block number `idx` of the tile; returns what that returns.
  template <bool kValues, class Tile>
  SA_DEVICE bool start_load(Tile& tile, int idx, primitives::Mbarrier* full) {
    using primitives::load_shared;
    const WorkTileInfo<Tiles::kConsumers>& work_tile = this->work_tile();
    const KeySource<kValues> source{params.attn,
                                    load_shared(kValues ? &work_tile.v_base : &work_tile.k_base),
                                    load_shared(&work_tile.pages),
                                    nullptr,
                                    load_shared(&work_tile.sink_end),
                                    load_shared(&work_tile.key_begin),
                                    load_shared(&work_tile.key_end)};
    const bool use_tma = kValues ? params.v_uses_tma : params.k_uses_tma;
    TmaKeySource tma =
        tma_key_source(source, use_tma ? (kValues ? &params.v_map : &params.k_map) : nullptr,
                       params.box_rows, load_shared(&work_tile.k_row),
                       load_shared(&work_tile.k_batch), load_shared(&work_tile.kv_head));
    // With a block table, TMA needs the page of each key; keys past the sequence may have none.
    tma.masked_keys_may_hold_garbage = !kValues && source.pages == nullptr;
    return start_load_keys(tile, source, tma, key_blocks_of(work_tile).block(idx) * Tiles::kBlockN,
                           full, primitives::lane_idx());
  }

  // Loads the tile's rows of Q: by TMA if q_uses_tma, else by cp.async.
  SA_DEVICE void load_queries(typename Storage::QTile& tile, primitives::Mbarrier* full) {
    using primitives::load_shared;
    using QTile = typename Storage::QTile;
    const int lane = primitives::lane_idx();
    if (params.q_uses_tma) {
      if (lane == 0) {
        primitives::mbarrier_arrive_expect_tx(full, static_cast<int>(sizeof(tile.data)));
      } else {
        primitives::mbarrier_arrive(full);
      }
      if (lane < kSlabs<QTile>) {
        const int at[5] = {lane * QTile::kSlabCols, 0,
                           load_shared(&work_tile().q_row) + load_shared(&work_tile().position),
                           load_shared(&work_tile().kv_head), load_shared(&work_tile().q_batch)};
        primitives::tma_load<5>(tile.data + lane * QTile::kRows * QTile::kSlabCols, &params.q_map,
                                full, at);
      }
      return;
    }
    const attention::FlashFwdParams& fwd = params.attn;
    const PackGqa rows = pack_gqa_rows_of(work_tile(), params.qhead_per_khead);
    const int row_begin = load_shared(&work_tile().row_begin);
    using Stored = typename QTile::Element;
    cp_async_rows(tile, static_cast<int>(fwd.head_dim), lane, [&](int row) {
      return row_begin + row < rows.num_rows ? static_cast<const Stored*>(fwd.q) +
                                                   rows.offset(row_begin + row, fwd.q_stride_batch,
                                                               fwd.q_stride_row, fwd.q_stride_head)
                                             : nullptr;
    });
    primitives::cp_async_commit();
    finish_cp_async(full);
  }

  // Waits until the consumers have read all stages. No copy is in flight when the warp ends.
  SA_DEVICE void wait_for_consumers(typename QRing::PipelineState q_state,
                                    typename KRing::PipelineState kv_state) {
    for (int stage = 0; stage < Tiles::kQueryStages; ++stage) {
      storage.q_ring.wait_until_empty(q_state);
      q_state.advance();
    }
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      storage.k_ring.wait_until_empty(kv_state);
      storage.loaded_v_ring().wait_until_empty(kv_state);
      kv_state.advance();
    }
  }
};

}  // namespace sink_attention::cuda::sm90
