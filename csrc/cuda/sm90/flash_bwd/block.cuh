// A backward CTA's block of keys, and the tiles of query rows that see some of it.
#pragma once

#include "attention/block_list.h"
#include "attention/mask.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm90/flash_bwd/params.h"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm90 {

template <class Tiles>
struct FlashBwdBlock {
  static constexpr int kBlockN = Tiles::kBlockN;

  const FlashBwdKernelParams& params;
  const FlashBwdBlockInfo& info;  // in shared memory

  SA_DEVICE const attention::FlashFwdParams& fwd() const { return params.bwd.fwd; }
  SA_DEVICE int batch_idx() const { return primitives::load_shared(&info.batch_idx); }
  SA_DEVICE int kv_head() const { return primitives::load_shared(&info.kv_head); }
  SA_DEVICE int qhead_per_khead() const { return params.qhead_per_khead; }
  SA_DEVICE int first_key() const { return primitives::load_shared(&info.first_key); }
  SA_DEVICE int sink_end() const { return primitives::load_shared(&info.sink_end); }
  SA_DEVICE int tiles_begin() const { return primitives::load_shared(&info.tiles_begin); }
  SA_DEVICE int tiles_end() const { return primitives::load_shared(&info.tiles_end); }
  SA_DEVICE int q_row() const { return primitives::load_shared(&info.q_row); }
  SA_DEVICE int seqlen_q() const { return primitives::load_shared(&info.seqlen_q); }
  SA_DEVICE int seqlen_k() const { return primitives::load_shared(&info.seqlen_k); }
  SA_DEVICE int num_rows() const { return seqlen_q() * qhead_per_khead(); }
  // First row and number of rows of a tile.
  SA_DEVICE int first_row(int tile) const { return tile * used_rows(); }
  SA_DEVICE int rows_of(int tile) const {
    return static_cast<int>(attention::min_of(used_rows(), num_rows() - first_row(tile)));
  }
  SA_DEVICE int used_rows() const { return params.workspace.used_rows; }
  // Keys of the block that exist. A CTA without keys does nothing.
  SA_DEVICE int num_keys() const {
    return static_cast<int>(attention::min_of(kBlockN, seqlen_k() - first_key()));
  }
  SA_DEVICE int64_t workspace_tile(int tile) const {
    return primitives::load_shared(&info.first_workspace_tile) + tile;
  }
  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(fwd(), seqlen_q(), seqlen_k());
  }

  // Writes the info. By one thread.
  SA_DEVICE void init_info(FlashBwdBlockInfo& to) const {
    const BlockCoord coord = block_coord(params.order, primitives::block_idx().x);
    const PackGqa rows = pack_gqa(fwd(), coord.batch_idx, coord.kv_head);
    const int seqlen_q = static_cast<int>(rows.info.seqlen_q);
    const int seqlen_k = static_cast<int>(rows.info.seqlen_k);
    const int first_key = coord.tile_idx * kBlockN;
    const attention::Range queries =
        attention::make_mask(fwd(), seqlen_q, seqlen_k)
            .visible_queries(first_key, attention::min_of(first_key + kBlockN, seqlen_k));
    const bool some = queries.begin < queries.end;
    const int first_tile = cuda::first_tile(params.workspace, fwd(), coord.batch_idx);
    const int tiles_left = params.workspace.num_tiles - first_tile;
    primitives::store_shared(&to.batch_idx, coord.batch_idx);
    primitives::store_shared(&to.kv_head, coord.kv_head);
    primitives::store_shared(&to.first_key, first_key);
    primitives::store_shared(
        &to.sink_end,
        static_cast<int>(attention::min_of(fwd().num_sink_tokens, seqlen_k)) - first_key);
    primitives::store_shared(&to.q_row, static_cast<int>(rows.info.q_row));
    primitives::store_shared(&to.seqlen_q, seqlen_q);
    primitives::store_shared(&to.seqlen_k, seqlen_k);
    primitives::store_shared(
        &to.tiles_begin,
        some ? static_cast<int>(queries.begin) * qhead_per_khead() / used_rows() : 0);
    primitives::store_shared(
        &to.tiles_end,
        some ? static_cast<int>(attention::min_of(
                   (static_cast<int>(queries.end) * qhead_per_khead() + used_rows() - 1) /
                       used_rows(),
                   tiles_left))
             : 0);
    primitives::store_shared(&to.first_workspace_tile,
                             coord.kv_head * params.workspace.num_tiles + first_tile);
  }

  SA_DEVICE int first_position(int tile) const { return first_row(tile) / qhead_per_khead(); }
  SA_DEVICE int last_position(int tile) const {
    return (first_row(tile) + rows_of(tile) - 1) / qhead_per_khead();
  }

  // Whether some key of the block is masked for some row of the tile. Rows beyond the sequence need
  // no mask: their lse is +inf, so P is 0.
  SA_DEVICE bool needs_mask(int tile) const {
    const attention::Range unmasked =
        mask().keys_seen_by_all(first_position(tile), last_position(tile) + 1);
    return unmasked.begin > first_key() || unmasked.end < first_key() + kBlockN;
  }

  // The block's keys in the window of a row of the tile; none for a row beyond the sequence.
  SA_DEVICE KeyRange window(int tile, int row) const {
    if (row >= rows_of(tile)) return {0, 0};
    const attention::Range keys =
        attention::intersect(mask().window_keys((first_row(tile) + row) / qhead_per_khead()),
                             {first_key(), first_key() + num_keys()});
    return {static_cast<int>(keys.begin - first_key()), static_cast<int>(keys.end - first_key())};
  }

  // How many blocks of keys add to the tile's dQ before this one: those visible to a row of it.
  SA_DEVICE int dq_semaphore_value(int tile) const {
    const attention::KeySet keys =
        mask().visible_keys(first_position(tile), last_position(tile) + 1);
    return attention::blocks_of(keys, kBlockN).index(first_key() / kBlockN);
  }
};

}  // namespace sink_attention::cuda::sm90
