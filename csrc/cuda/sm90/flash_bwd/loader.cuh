// The loader warps of the backward: one loads K and each tile's Q, the other V and each tile's dO.
//
// A tile's rows are one TMA box a slab where whole positions fill it well enough
// (rows_of_whole_positions). The remaining rows are zeroed once, at the start; no box reaches them.
// Otherwise rows are copied by cp.async, 16 bytes at a time.
//
// Rows beyond the sequence may hold garbage, which must not reach a product. If the tensor ends
// there, TMA zero-fills. If another packed sequence follows, the last tile comes with rows of that
// sequence. The warp overwrites them with zeros before it arrives at the tile's `full` barrier.
// Tiles are visited from the last to the first, so this happens once.
#pragma once

#include <type_traits>

#include "cuda/sm90/flash_bwd/block.cuh"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"
#include "cuda/tile/copy.cuh"
#include "primitives/bulk.h"
#include "primitives/memory.h"
#include "primitives/tma.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

// Arrivals at a tile's `full` barrier: one with the expected bytes, one when all else is written.
constexpr int kTileArrivals = 2;

template <class Element, class Tiles, bool kDout>
struct FlashBwdLoader {
  using Storage = FlashBwdStorage<Element, Tiles>;
  using Block = FlashBwdBlock<Tiles>;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kFloatBytes = kBlockM * static_cast<int>(sizeof(float));

  const FlashBwdKernelParams& params;
  const Block block;
  Storage& storage;

  // All lanes of the warp call. The consumers wait for all loads that start here.
  SA_DEVICE void run() {
    load_keys_of_block();
    if (uses_tma()) {
      SA_ROLLED
      for (int stage = 0; stage < Tiles::kStages; ++stage) {
        zero_rows(rows(stage), block.used_rows(), kBlockM);
      }
    }
    SA_ROLLED
    for (int i = 0; i < block.tiles_end() - block.tiles_begin(); ++i) {
      ring().wait_until_empty(pipeline_state<Tiles::kStages>(i));
      load_tile(block.tiles_end() - 1 - i, i % Tiles::kStages);
    }
  }

 private:
  SA_DEVICE static int lane() { return primitives::rematerialise_lane_idx(); }

  SA_DEVICE Ring<Tiles::kStages>& ring() const {
    if constexpr (kDout)
      return storage.dout_ring;
    else
      return storage.q_ring;
  }
  SA_DEVICE auto& rows(int stage) const {
    if constexpr (kDout)
      return storage.dout[stage].tile;
    else
      return storage.q[stage].tile;
  }
  SA_DEVICE bool uses_tma() const { return kDout ? params.has_dout_map : params.has_q_map; }
  SA_DEVICE auto& keys() const {
    if constexpr (kDout)
      return storage.v;
    else
      return storage.k;
  }

  SA_DEVICE void load_keys_of_block() const {
    const bool has_map = kDout ? params.has_v_map : params.has_k_map;
    const primitives::TensorMap* map = kDout ? &params.v_map : &params.k_map;
    const attention::SeqlenInfo info = attention::seqlen_info(block.fwd(), block.batch_idx());
    const attention::KeySet all{0, {0, info.seqlen_k}};
    const auto source =
        key_source<kDout>(block.fwd(), block.batch_idx(), block.kv_head(), info, all);
    load_keys(keys(), source,
              tma_key_source(source, has_map ? map : nullptr, Tiles::kBlockN,
                             static_cast<int>(info.k_row), static_cast<int>(info.k_batch),
                             block.kv_head()),
              block.first_key(), kDout ? &storage.v_full : &storage.k_full, lane());
  }

  // Loads a tile and its rows' delta (dO), or lse and windows of keys (Q).
  SA_DEVICE void load_tile(int tile, int stage) const {
    using Tile = std::remove_reference_t<decltype(rows(0))>;
    constexpr int kRowBytes = Tile::kCols * static_cast<int>(sizeof(Element));
    Tile& to = rows(stage);
    primitives::Mbarrier* full = &ring().full[stage];
    const bool use_tma = uses_tma();
    const bool has_foreign_rows =
        use_tma && block.fwd().cu_seqlens_q != nullptr && block.rows_of(tile) < block.used_rows();
    primitives::Mbarrier* tail_full = kDout ? &storage.dout_tail_full : &storage.q_tail_full;
    if (lane() == 0) {
      const int tile_bytes = block.used_rows() * kRowBytes;
      primitives::mbarrier_arrive_expect_tx(
          full, kFloatBytes + (use_tma && !has_foreign_rows ? tile_bytes : 0));
      primitives::bulk_load(kDout ? storage.delta[stage] : storage.lse_log2[stage],
                            (kDout ? params.workspace.delta : params.workspace.lse_log2) +
                                block.workspace_tile(tile) * kBlockM,
                            kFloatBytes, full);
      if (has_foreign_rows) primitives::mbarrier_arrive_expect_tx(tail_full, tile_bytes);
    }
    if (use_tma) {
      if (lane() < kSlabs<Tile>) {
        const bool packed = block.fwd().cu_seqlens_q != nullptr;
        primitives::tma_load<5>(
            to.data + lane() * kBlockM * Tile::kSlabCols, kDout ? &params.dout_map : &params.q_map,
            has_foreign_rows ? tail_full : full,
            {lane() * Tile::kSlabCols, 0, block.q_row() + block.first_position(tile),
             block.kv_head(), packed ? 0 : block.batch_idx()});
      }
    } else {
      copy_tile(to, tile);
    }
    if constexpr (!kDout) store_windows(tile, stage);
    if (!use_tma) {
      primitives::cp_async_wait<0>();
      primitives::fence_proxy_async();
    } else if (has_foreign_rows) {
      primitives::mbarrier_wait(tail_full, 0);
      zero_rows(to, block.rows_of(tile), block.used_rows());
    }
    primitives::sync_warp();
    if (lane() == 0) primitives::mbarrier_arrive(full);
  }

  // Stores whether the tile needs a mask, and if so its rows' windows. Overlaps the loads.
  SA_DEVICE void store_windows(int tile, int stage) const {
    const int masked = block.needs_mask(tile);
    if (masked) {
      SA_ROLLED
      for (int row = lane(); row < kBlockM; row += primitives::kWarpSize) {
        primitives::store_shared(storage.window[stage] + row, block.window(tile, row));
      }
    }
    if (lane() == 0) primitives::store_shared(&storage.is_masked[stage], masked);
  }

  template <class Tile>
  SA_DEVICE void copy_tile(Tile& to, int tile) const {
    const attention::FlashBwdParams& bwd = params.bwd;
    const attention::FlashFwdParams& fwd = bwd.fwd;
    const int64_t stride_batch = kDout ? bwd.dout_stride_batch : fwd.q_stride_batch;
    const int64_t stride_row = kDout ? bwd.dout_stride_row : fwd.q_stride_row;
    const int64_t stride_head = kDout ? bwd.dout_stride_head : fwd.q_stride_head;
    const int64_t batch = fwd.cu_seqlens_q != nullptr ? 0 : block.batch_idx();
    const Element* first = static_cast<const Element*>(kDout ? bwd.dout : fwd.q) +
                           batch * stride_batch + block.q_row() * stride_row +
                           int64_t{block.kv_head()} * block.qhead_per_khead() * stride_head;
    const int num_rows = block.rows_of(tile);
    const int first_row = block.first_row(tile);
    cp_async_rows(to, static_cast<int>(kDout ? fwd.head_dim_v : fwd.head_dim), lane(),
                  [&](int row) -> const Element* {
                    const int position = (first_row + row) / block.qhead_per_khead();
                    const int head = first_row + row - position * block.qhead_per_khead();
                    return row < num_rows ? first + position * stride_row + head * stride_head
                                          : nullptr;
                  });
    primitives::cp_async_commit();
  }

  // Zeroes rows [begin, end), before the warp arrives at the `full` barrier.
  template <class Tile>
  SA_DEVICE void zero_rows(Tile& tile, int begin, int end) const {
    SA_ROLLED
    for (int row = begin + lane() / Tile::kSlabChunks; row < end;
         row += primitives::kWarpSize / Tile::kSlabChunks) {
      SA_ROLLED
      for (int chunk = lane() % Tile::kSlabChunks; chunk < Tile::kChunks;
           chunk += Tile::kSlabChunks) {
        primitives::store_shared(reinterpret_cast<primitives::Bytes16*>(tile.chunk(row, chunk)),
                                 primitives::Bytes16{});
      }
    }
    primitives::fence_proxy_async();
  }
};

}  // namespace sink_attention::cuda::sm90
