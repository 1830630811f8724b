// The scheduler warp: writes work tiles ahead of the warps that read them (work_tile.cuh).
#pragma once

#include "attention/mask.h"
#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"

namespace sink_attention::cuda::sm90 {

// A tile is written in steps. Each step re-reads its inputs from shared memory: this warp has only
// kProducerRegisters.
template <class Element, class Tiles>
struct FlashFwdScheduler {
  using Storage = FlashFwdStorage<Element, Tiles>;

  const FlashFwdKernelParams& kernel_params;
  Storage& storage;
  WorkTileIndex tile_idx{};
  int round = 0;  // next round to schedule; -1 once the end marker is published

  SA_DEVICE void run() {
    while (round >= 0) write_next();
  }

  // Publishes the next tile that has rows, or the end marker; after that it does nothing. Waits
  // until the tile kWorkTileSlots before it has been read. All lanes call.
  SA_DEVICE void write_next() {
    if (round < 0) return;
    storage.work_tiles.ring.wait_until_empty(tile_idx.state());
    if (find_and_write_coord()) write_key_info();
    primitives::sync_warp();
    if (is_first_lane())
      primitives::mbarrier_arrive(&storage.work_tiles.ring.full[tile_idx.slot()]);
    ++tile_idx.index;
  }

 private:
  struct TileCoord {
    int batch_idx;
    int kv_head;
    int row_begin;
  };

  template <class T>
  static SA_DEVICE T load(const T& field) {
    return primitives::load_shared(&field);
  }
  template <class T>
  static SA_DEVICE void store(T& field, T value) {
    primitives::store_shared(&field, value);
  }
  static SA_DEVICE bool is_first_lane() { return primitives::lane_idx() == 0; }
  SA_DEVICE WorkTileInfo<Tiles::kConsumers>& work_tile() const {
    return storage.work_tiles.tile[tile_idx.slot()];
  }

  // The work tile of this CTA in a round.
  SA_DEVICE static int64_t tile_of_round(int round) {
    const int blocks = primitives::grid_dim().x;
    const int block = primitives::block_idx().x;
    return int64_t{round} * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }

  // Finds the next tile with rows and writes its coordinates. Returns false if no tile is left.
  // Each lane looks at one round. Tiles without rows exist where packed sequences differ in length:
  // the grid has as many tiles as if all were as long as the longest.
  SA_DEVICE bool find_and_write_coord() {
    const int lane = primitives::lane_idx();
    for (; tile_of_round(round) < kernel_params.num_work_tiles; round += primitives::kWarpSize) {
      const int64_t idx = tile_of_round(round + lane);
      TileCoord coord{};
      bool has_rows = false;
      if (idx < kernel_params.num_work_tiles) {
        coord = coord_of(static_cast<int>(idx));
        has_rows = coord.row_begin < seqlen_info_of(coord).seqlen_q * kernel_params.qhead_per_khead;
      }
      const int first = primitives::first_lane(has_rows);
      if (first == primitives::kWarpSize) continue;
      if (lane == first) write(coord);
      primitives::sync_warp();
      round += first + 1;
      return true;
    }
    if (is_first_lane()) store(work_tile().num_rows, 0);
    round = -1;
    return false;
  }

  SA_DEVICE TileCoord coord_of(int idx) const {
    const int num_heads = static_cast<int>(kernel_params.attn.num_heads_kv);
    const int num_pairs = kernel_params.num_work_tiles / kernel_params.num_tiles;
    const int section = idx / (kernel_params.section * kernel_params.num_tiles);
    const int first_pair = section * kernel_params.section;
    const int section_pairs = kernel_params.section < num_pairs - first_pair
                                  ? kernel_params.section
                                  : num_pairs - first_pair;
    const int in_section = idx - first_pair * kernel_params.num_tiles;
    const int tile_from_end = in_section / section_pairs;
    const int pair = first_pair + in_section - tile_from_end * section_pairs;
    const int batch_idx = pair / num_heads;
    return {batch_idx, pair - batch_idx * num_heads,
            (kernel_params.num_tiles - 1 - tile_from_end) * Tiles::kBlockM};
  }
  SA_DEVICE attention::SeqlenInfo seqlen_info_of(const TileCoord& coord) const {
    return attention::seqlen_info(kernel_params.attn, coord.batch_idx);
  }

  SA_DEVICE void write(const TileCoord& coord) const {
    const attention::SeqlenInfo info = seqlen_info_of(coord);
    const int seqlen_q = static_cast<int>(info.seqlen_q);
    store(work_tile().num_rows, seqlen_q * kernel_params.qhead_per_khead);
    store(work_tile().row_begin, coord.row_begin);
    store(work_tile().position, coord.row_begin / kernel_params.qhead_per_khead);
    store(work_tile().kv_head, coord.kv_head);
    store(work_tile().batch_idx, coord.batch_idx);
    store(work_tile().seqlen_q, seqlen_q);
    store(work_tile().seqlen_k, static_cast<int>(info.seqlen_k));
    store(work_tile().q_batch, static_cast<int>(info.q_batch));
    store(work_tile().q_row, static_cast<int>(info.q_row));
    store(work_tile().k_batch, static_cast<int>(info.k_batch));
    store(work_tile().k_row, static_cast<int>(info.k_row));
  }

  SA_DEVICE void write_key_info() const {
    if (is_first_lane()) {
      storage.write_scale(kernel_params, tile_idx.slot());
      write_key_blocks();
    }
    primitives::sync_warp();
    if (key_blocks_of(work_tile()).count() == 0) return;
    if (primitives::lane_idx() < Tiles::kConsumers) write_unmasked_blocks(primitives::lane_idx());
    primitives::sync_warp();
    if (is_first_lane()) write_readable_keys();
    primitives::sync_warp();
    if (is_first_lane()) store(work_tile().k_base, source<false>().base);
    primitives::sync_warp();
    if (is_first_lane()) {
      store(work_tile().v_base, source<true>().base);
      store(work_tile().pages, source<true>().pages);
    }
  }

  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(kernel_params.attn, load(work_tile().seqlen_q),
                                load(work_tile().seqlen_k));
  }
  // The query position of a row of the tile, at most that of the sequence's last row.
  SA_DEVICE int position(int row) const {
    const int row_in_head = load(work_tile().row_begin) + row;
    const int last = load(work_tile().num_rows) - 1;
    return (row_in_head < last ? row_in_head : last) / kernel_params.qhead_per_khead;
  }

  SA_DEVICE void write_key_blocks() const {
    const attention::KeySet visible =
        mask().visible_keys(load(work_tile().position), position(Tiles::kBlockM - 1) + 1);
    const attention::BlockList<int> blocks = attention::blocks_of(visible, Tiles::kBlockN);
    store(work_tile().blocks.sink_end, blocks.sink_end);
    store(work_tile().blocks.begin, blocks.begin);
    store(work_tile().blocks.end, blocks.end);
  }

  SA_DEVICE void write_unmasked_blocks(int warpgroup) const {
    const attention::Range unmasked =
        mask().keys_seen_by_all(position(64 * warpgroup), position(64 * warpgroup + 63) + 1);
    BlockRange& blocks = work_tile().unmasked[warpgroup];
    store(blocks.begin, (static_cast<int>(unmasked.begin) + Tiles::kBlockN - 1) / Tiles::kBlockN);
    store(blocks.end, static_cast<int>(attention::max_of(unmasked.end, 0)) / Tiles::kBlockN);
  }

  // The keys visible to some query of the sequence. Keys visible only to rows of other tiles count
  // too, so that TMA boxes need not end at this tile's edge.
  SA_DEVICE void write_readable_keys() const {
    const attention::KeySet keys = mask().visible_keys(0, load(work_tile().seqlen_q));
    store(work_tile().sink_end, static_cast<int>(keys.sink_end));
    store(work_tile().key_begin, static_cast<int>(keys.window.begin));
    store(work_tile().key_end, static_cast<int>(keys.window.end));
  }

  template <bool kValues>
  SA_DEVICE KeySource<kValues> source() const {
    attention::SeqlenInfo info{};
    info.k_batch = load(work_tile().k_batch);
    info.k_row = load(work_tile().k_row);
    return key_source<kValues>(kernel_params.attn, load(work_tile().batch_idx),
                               load(work_tile().kv_head), info, {0, {0, 0}});
  }
};

}  // namespace sink_attention::cuda::sm90
