// Work tiles: a tile of kBlockM rows of one sequence and kv head each.
//
// Persistent CTAs, one an SM, on a static schedule. In round r, CTA i takes work tile
// r * gridDim.x + i. Odd rounds run in reverse, so that a CTA with a long tile gets a short one
// next.
//
// Tile order. (sequence, kv head) pairs are cut into sections, whose keys and values fit into L2.
// Sections follow each other. Within a section, row tiles are ordered from the last tile of the
// longest sequence to the first, and pairs are the inner index. Under a causal mask the longest
// tiles come first, so that short ones finish last.
//
// The scheduler warp (scheduler.cuh) writes each tile's WorkTileInfo ahead into a ring in shared
// memory. So the other warps wait for no division and no load of a length, and never see a tile
// without rows. They read fields where they need them, since accumulators leave no registers.
#pragma once

#include "attention/block_list.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm90/ring.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

struct BlockRange {  // key blocks [begin, end), empty where end <= begin
  int begin;
  int end;
};

template <int kConsumers>
struct WorkTileInfo {
  int num_rows;   // of the sequence and kv head: seqlen_q * qhead_per_khead. 0: no tile is left
  int row_begin;  // first PackGQA row of the tile, below num_rows
  int position;   // query position of row_begin
  int kv_head;
  int batch_idx;
  int seqlen_q;
  int seqlen_k;
  int q_batch;
  int q_row;                         // of position 0
  attention::BlockList<int> blocks;  // key blocks visible to some row of the tile
  // Except for k_batch and k_row, the fields below are written only if there are such blocks.
  BlockRange unmasked[kConsumers];  // key blocks visible as a whole to all rows of a warpgroup
  // For the producer:
  int k_batch;
  int k_row;
  const int32_t* pages;  // the sequence's row of the block table, or null
  const char* k_base;    // as in KeySource
  const char* v_base;
  int sink_end;  // keys [0, sink_end) and [key_begin, key_end) may be loaded
  int key_begin;
  int key_end;
};

// Enough slots that the scheduler does not wait for an empty one. The producer is at most two or
// three tiles with keys ahead of the consumers, since each tile's Q needs a stage.
constexpr int kWorkTileSlots = 8;

// The index of a tile among its CTA's work tiles, and its slot in the ring.
struct WorkTileIndex {
  uint32_t index = 0;
  SA_DEVICE int slot() const { return static_cast<int>(index % kWorkTileSlots); }
  SA_DEVICE Ring<kWorkTileSlots>::PipelineState state() const {
    return {slot(), static_cast<int>(index / kWorkTileSlots % 2)};
  }
};

template <int kConsumers>
struct WorkTileQueue {
  WorkTileInfo<kConsumers> tile[kWorkTileSlots];
  Ring<kWorkTileSlots> ring;

  // By one thread. readers: the number of warps that read; each reads all tiles.
  SA_DEVICE void init(int readers) { ring.init(1, readers); }

  // A reading warp waits for tile `tile_idx`. Returns false if no tile is left.
  SA_DEVICE bool wait_for(WorkTileIndex tile_idx) {
    ring.wait_until_full(tile_idx.state());
    return primitives::load_shared(&tile[tile_idx.slot()].num_rows) > 0;
  }
  // Releases the slot when the warp has read it. All lanes call.
  SA_DEVICE void release(WorkTileIndex& tile_idx) {
    primitives::sync_warp();
    if (primitives::lane_idx() == 0) primitives::mbarrier_arrive(&ring.empty[tile_idx.slot()]);
    ++tile_idx.index;
  }
};

template <int kConsumers>
SA_DEVICE attention::BlockList<int> key_blocks_of(const WorkTileInfo<kConsumers>& tile) {
  using primitives::load_shared;
  return {load_shared(&tile.blocks.sink_end), load_shared(&tile.blocks.begin),
          load_shared(&tile.blocks.end)};
}

// The PackGQA rows of the tile's sequence and kv head, for offsets in q, out and lse.
template <int kConsumers>
SA_DEVICE PackGqa pack_gqa_rows_of(const WorkTileInfo<kConsumers>& tile, int qhead_per_khead) {
  using primitives::load_shared;
  PackGqa rows{};
  rows.info.q_batch = load_shared(&tile.q_batch);
  rows.info.q_row = load_shared(&tile.q_row);
  rows.qhead_per_khead = qhead_per_khead;
  rows.kv_head = load_shared(&tile.kv_head);
  rows.num_rows = load_shared(&tile.num_rows);
  return rows;
}

}  // namespace sink_attention::cuda::sm90
