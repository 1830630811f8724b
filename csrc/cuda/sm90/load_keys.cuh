// A block of keys or values into shared memory, by one warp: box by box where all of the block's
// keys may be read, else chunk by chunk with zeros for the others.
//
// What no query of a sequence sees, beyond its keys or before all windows, may be anything, NaNs
// too, or pages that are gone, and must not reach a product: a weight of 0 does not hide it. TMA
// writes zeros only for what lies outside of the tensor. The forward's scores are the exception,
// which a mask replaces whatever they are.
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/key_source.cuh"
#include "primitives/bulk.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

// The arrivals that load_keys makes at a `full` barrier: one a lane.
constexpr int kLoadArrivals = 32;

// How the boxes of a sequence's keys are found (tensor_maps.h).
struct KeyBoxes {
  const primitives::TensorMap* map;  // null: none
  int rows;                          // keys of a box
  int first_row;                     // of key 0; 0 with a block table
  int kv_head;
  int batch_idx;                 // meaningless with a block table
  bool to_the_end;               // no key lies beyond the sequence's but outside of the tensor
  bool may_be_anything = false;  // the unseen keys' products, if the tensor has them, are replaced

  // Whether all keys of a block may be asked for: some query sees each of them.
  template <bool kValues>
  SA_DEVICE bool hold(const KeySource<kValues>& source, int first_key, int keys) const {
    if (map == nullptr) return false;
    if (may_be_anything) return true;
    const int end = first_key + keys;
    return end <= source.sink_end ||
           (source.begin <= first_key && (to_the_end || end <= source.end));
  }
};

template <bool kValues>
SA_DEVICE KeyBoxes key_boxes(const KeySource<kValues>& source, const primitives::TensorMap* map,
                             int rows, int k_row, int k_batch, int kv_head) {
  const attention::FlashFwdParams& params = source.params;
  const bool paged = params.block_table != nullptr;
  return {
      map,     rows,    paged ? 0 : k_row,
      kv_head, k_batch, !paged && params.cu_seqlens_k == nullptr && params.seqused_k == nullptr};
}

template <class Tile>
constexpr int kSlabs = Tile::kCols / Tile::kSlabCols;

// Starts the copies of the boxes of keys [first_key, first_key + kRows), and arrives.
template <class Tile, bool kValues>
SA_DEVICE void start_boxes(Tile& tile, const KeySource<kValues>& source, const KeyBoxes& boxes,
                           int first_key, primitives::Mbarrier* full, int lane) {
  if (lane == 0) {
    primitives::mbarrier_arrive_expect_tx(full, static_cast<int>(sizeof(tile.data)));
  } else {
    primitives::mbarrier_arrive(full);
  }
  if (source.pages == nullptr) {  // one box of each slab
    if (lane < kSlabs<Tile>) {
      const int at[4] = {lane * Tile::kSlabCols, boxes.first_row + first_key, boxes.kv_head,
                         boxes.batch_idx};
      primitives::tma_load<4>(tile.data + lane * Tile::kRows * Tile::kSlabCols, boxes.map, full,
                              at);
    }
    return;
  }
  // Of a page that the cache does not have, the copy engine makes zeros.
  const int page_size = static_cast<int>(source.params.page_size);
  SA_ROLLED
  for (int row = lane * boxes.rows; row < Tile::kRows; row += primitives::kWarpSize * boxes.rows) {
    const int key = first_key + row;
    const int page = key / page_size;
    int at[4] = {0, key - page * page_size, boxes.kv_head,
                 primitives::load_global(source.pages + page)};
    SA_ROLLED
    for (int slab = 0; slab < kSlabs<Tile>; ++slab) {
      at[0] = slab * Tile::kSlabCols;
      primitives::tma_load<4>(tile.data + (slab * Tile::kRows + row) * Tile::kSlabCols, boxes.map,
                              full, at);
    }
  }
}

// Starts the copies of all rows of a tile by one warp, in few registers; the caller commits and
// waits. row_of(r): where row r lies, or null for zeros.
template <class Tile, class RowOf>
SA_DEVICE void copy_rows(Tile& tile, int cols, int lane, RowOf row_of) {
  SA_ROLLED
  for (int row = lane / Tile::kSlabChunks; row < Tile::kRows;
       row += primitives::kWarpSize / Tile::kSlabChunks) {
    const typename Tile::Element* numbers = row_of(row);
    SA_ROLLED
    for (int chunk = lane % Tile::kSlabChunks; chunk < Tile::kChunks; chunk += Tile::kSlabChunks) {
      const bool valid = numbers != nullptr && chunk * kChunkElems < cols;
      primitives::cp_async_16(tile.chunk(row, chunk),
                              valid ? numbers + chunk * kChunkElems : numbers, valid);
    }
  }
}

// Starts the copies of keys [first_key, first_key + kRows), whose rows are chunks
// (rows_are_vectorised). The stage is empty; all lanes of the warp call. Those that may not be read
// become zeros. Returns whether it has arrived, which is so with boxes; else finish_chunks does.
template <class Tile, bool kValues>
SA_DEVICE bool start_keys(Tile& tile, const KeySource<kValues>& source, const KeyBoxes& boxes,
                          int first_key, primitives::Mbarrier* full, int lane) {
  if (boxes.hold(source, first_key, Tile::kRows)) {
    start_boxes(tile, source, boxes, first_key, full, lane);
    return true;
  }
  copy_rows(tile, source.dim(), lane,
            [&](int row) { return source.template row<typename Tile::Element>(first_key + row); });
  primitives::cp_async_commit();
  return false;
}

// Waits for all chunks that this lane copies, and arrives.
SA_DEVICE void finish_chunks(primitives::Mbarrier* full) {
  primitives::cp_async_wait<0>();
  primitives::fence_proxy_async();
  primitives::mbarrier_arrive(full);
}

// Both.
template <class Tile, bool kValues>
SA_DEVICE void load_keys(Tile& tile, const KeySource<kValues>& source, const KeyBoxes& boxes,
                         int first_key, primitives::Mbarrier* full, int lane) {
  if (!start_keys(tile, source, boxes, first_key, full, lane)) finish_chunks(full);
}

}  // namespace sink_attention::cuda::sm90
