// One warp loads a block of keys or values into shared memory. It uses TMA where all of the block's
// keys may be read; otherwise cp.async, 16 bytes at a time, with zeros for the other keys.
//
// Masked keys may hold garbage: keys past the sequence's end or before all windows may be NaN, and
// their pages may be gone. They must not reach a product, since P = 0 times NaN is NaN. TMA
// zero-fills only what lies outside of the tensor. The forward's scores are the exception: the mask
// replaces them, whatever they are.
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/key_source.cuh"
#include "primitives/bulk.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

// Arrivals of load_keys at a `full` barrier: one a lane.
constexpr int kLoadArrivals = 32;

// Where TMA finds the keys of a sequence (tensor_maps.h).
struct TmaKeySource {
  const primitives::TensorMap* map;  // null: TMA is not used
  int rows;                          // keys of a TMA box
  int first_row;                     // of key 0; 0 with a block table
  int kv_head;
  int batch_idx;               // ignored with a block table
  bool tail_is_out_of_bounds;  // keys past seqlen_k lie outside of the tensor: TMA zero-fills them
  bool masked_keys_may_hold_garbage = false;  // the caller replaces all products of masked keys

  // Whether TMA may load a block: each of its keys is visible to some query, is zero-filled, or may
  // hold garbage.
  template <bool kValues>
  SA_DEVICE bool can_load(const KeySource<kValues>& source, int first_key, int keys) const {
    if (map == nullptr) return false;
    if (masked_keys_may_hold_garbage) return true;
    const int end = first_key + keys;
    return end <= source.sink_end ||
           (source.begin <= first_key && (tail_is_out_of_bounds || end <= source.end));
  }
};

template <bool kValues>
SA_DEVICE TmaKeySource tma_key_source(const KeySource<kValues>& source,
                                      const primitives::TensorMap* map, int rows, int k_row,
                                      int k_batch, int kv_head) {
  const attention::FlashFwdParams& params = source.params;
  const bool paged = params.block_table != nullptr;
  return {
      map,     rows,    paged ? 0 : k_row,
      kv_head, k_batch, !paged && params.cu_seqlens_k == nullptr && params.seqused_k == nullptr};
}

template <class Tile>
constexpr int kSlabs = Tile::kCols / Tile::kSlabCols;

// Starts the TMA loads of keys [first_key, first_key + kRows), and arrives at `full`.
template <class Tile, bool kValues>
SA_DEVICE void start_tma_load(Tile& tile, const KeySource<kValues>& source, const TmaKeySource& tma,
                              int first_key, primitives::Mbarrier* full, int lane) {
  if (lane == 0) {
    primitives::mbarrier_arrive_expect_tx(full, static_cast<int>(sizeof(tile.data)));
  } else {
    primitives::mbarrier_arrive(full);
  }
  if (source.pages == nullptr) {  // one box a slab
    if (lane < kSlabs<Tile>) {
      const int at[4] = {lane * Tile::kSlabCols, tma.first_row + first_key, tma.kv_head,
                         tma.batch_idx};
      primitives::tma_load<4>(tile.data + lane * Tile::kRows * Tile::kSlabCols, tma.map, full, at);
    }
    return;
  }
  // TMA zero-fills a page that the cache does not have.
  const int page_size = static_cast<int>(source.params.page_size);
  SA_ROLLED
  for (int row = lane * tma.rows; row < Tile::kRows; row += primitives::kWarpSize * tma.rows) {
    const int key = first_key + row;
    const int page = key / page_size;
    int at[4] = {0, key - page * page_size, tma.kv_head,
                 primitives::load_global(source.pages + page)};
    SA_ROLLED
    for (int slab = 0; slab < kSlabs<Tile>; ++slab) {
      at[0] = slab * Tile::kSlabCols;
      primitives::tma_load<4>(tile.data + (slab * Tile::kRows + row) * Tile::kSlabCols, tma.map,
                              full, at);
    }
  }
}

// Starts the cp.async of all rows of a tile by one warp, in few registers. The caller commits and
// waits. row_of(r) points to row r, or is null for zeros.
template <class Tile, class RowOf>
SA_DEVICE void cp_async_rows(Tile& tile, int cols, int lane, RowOf row_of) {
  SA_ROLLED
  for (int row = lane / Tile::kSlabChunks; row < Tile::kRows;
       row += primitives::kWarpSize / Tile::kSlabChunks) {
    const typename Tile::Element* source_row = row_of(row);
    SA_ROLLED
    for (int chunk = lane % Tile::kSlabChunks; chunk < Tile::kChunks; chunk += Tile::kSlabChunks) {
      const bool valid = source_row != nullptr && chunk * kChunkElems < cols;
      primitives::cp_async_16(tile.chunk(row, chunk),
                              valid ? source_row + chunk * kChunkElems : source_row, valid);
    }
  }
}

// Starts the loads of keys [first_key, first_key + kRows). Keys that may not be read become zeros.
// Requires an empty stage, 16-byte aligned rows (rows_are_vectorised) and all lanes of the warp.
// Returns whether the lane has arrived at `full`: true with TMA. Otherwise the caller calls
// finish_cp_async.
template <class Tile, bool kValues>
SA_DEVICE bool start_load_keys(Tile& tile, const KeySource<kValues>& source,
                               const TmaKeySource& tma, int first_key, primitives::Mbarrier* full,
                               int lane) {
  if (tma.can_load(source, first_key, Tile::kRows)) {
    start_tma_load(tile, source, tma, first_key, full, lane);
    return true;
  }
  cp_async_rows(tile, source.dim(), lane, [&](int row) {
    return source.template row<typename Tile::Element>(first_key + row);
  });
  primitives::cp_async_commit();
  return false;
}

// Waits for this lane's cp.async, and arrives at `full`.
SA_DEVICE void finish_cp_async(primitives::Mbarrier* full) {
  primitives::cp_async_wait<0>();
  primitives::fence_proxy_async();
  primitives::mbarrier_arrive(full);
}

// start_load_keys, then finish_cp_async where needed.
template <class Tile, bool kValues>
SA_DEVICE void load_keys(Tile& tile, const KeySource<kValues>& source, const TmaKeySource& tma,
                         int first_key, primitives::Mbarrier* full, int lane) {
  if (!start_load_keys(tile, source, tma, first_key, full, lane)) finish_cp_async(full);
}

}  // namespace sink_attention::cuda::sm90
