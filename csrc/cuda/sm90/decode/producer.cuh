// The producer warp: fills the ring with a split's keys and values, in the order K 0, V 0, K 1, ...
//
// TMA is used for a block of keys if all of these hold:
//
//   1. TMA boxes of box_rows keys divide a page (box_rows > 0);
//   2. all keys of the block are before keys.end, which is at most seqlen_k;
//   3. keys.begin and keys.sink_end, if within the block, lie on box edges.
//
// Masked keys may hold garbage. By 3, a box is either readable as a whole or masked as a whole. A
// fully masked box is requested at page num_pages, out of bounds: TMA writes zeros. Other blocks
// are copied by cp.async, 16 bytes at a time, with zeros for keys that may not be read. Scales of
// tokens are copied by cp.async too. For cp.async, each lane looks up the slots of some of the
// block's keys, one block ahead, and shuffles pass them to the other lanes.
//
// Deferred signal. Only the lanes that issued a cp.async can wait for it, and must do so before the
// stage's `full` barrier is arrived on. Waiting at once would hold up the next blocks' copies. So a
// cp.async stage's barrier is arrived on kAhead stages later, when its group has drained. All copies
// of a short sequence are then in flight before the first is waited for. kAhead < kStages: when the
// warp waits for a stage to become empty, it has signalled that stage's earlier contents.
#pragma once

#include "cuda/sm90/decode/params.h"
#include "cuda/sm90/decode/storage.cuh"
#include "cuda/tile/key_source.cuh"
#include "primitives/bulk.h"
#include "primitives/cp_async.h"
#include "primitives/tma.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

template <class Storage, class Tiles>
struct DecodeProducer {
  // Even, so that the stage to signal holds keys whenever the latest stage does.
  static constexpr int kAhead = Tiles::kStages > 10 ? 8 : (Tiles::kStages - 1) / 2 * 2;
  static_assert(kAhead >= 2 && kAhead < Tiles::kStages && kAhead < 31);
  using PipelineState = typename Ring<Tiles::kStages>::PipelineState;
  static constexpr int kBlockN = Tiles::kBlockN;
  static constexpr int kWarpSize = primitives::kWarpSize;

  static constexpr int kLaneKeys = kBlockN / kWarpSize;  // keys of a block a lane looks up

  // Where keys lane, lane + 32, ... of a block lie in the paged cache.
  struct KeySlots {
    int page[kLaneKeys];  // -1: not to be read
    int slot[kLaneKeys];
  };
  static constexpr uint32_t kUnreadable = 0xffffffffu;  // an offset

  const DecodeKernelParams& kernel_params;
  Storage& storage;
  const KeyBlockRange& key_blocks;
  const KeySource<false>& keys;
  const KeySource<true>& values;
  int kv_head;
  int lane;

  PipelineState state{};         // the next stage to fill
  PipelineState signal_state{};  // the stage kAhead before the latest filled one
  int started = 0;               // stages filled
  // Bit i is of the i-th latest stage.
  uint32_t pending_mask = 0;  // its `full` barrier awaits the deferred signal
  uint32_t tma_mask = 0;      // it is loaded by TMA; pending too if its scales come by cp.async

  SA_DEVICE void run() {
    if (kernel_params.box_rows > 0 && lane == 0) {
      primitives::prefetch_tensor_map(&kernel_params.k_map);
      primitives::prefetch_tensor_map(&kernel_params.v_map);
    }
    const int box_rows = kernel_params.box_rows;
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    const int boxes_per_block = box_rows == 0 ? 1 : kBlockN / box_rows;
    // This lane starts box `box` of slab `slab`.
    const int slab = lane / boxes_per_block;
    const int box = lane % boxes_per_block;
    // Of each 32 boxes, the lane holds the page of one. The pages of the next 32 boxes and the
    // slots of the next block are loaded ahead.
    int pages = 0;
    int next_pages = box_rows == 0 ? 0 : page_of_box(lane, boxes_per_block);
    int first_box = 0;
    KeySlots slots{};
    KeySlots next_slots = look_up_slots(key_blocks.begin);
    for (int idx = key_blocks.begin; idx < key_blocks.end; ++idx) {
      const int first_key = key_blocks.blocks.block(idx) * kBlockN;
      const bool use_tma = uses_tma(first_key);
      slots = next_slots;
      next_slots = look_up_slots(idx + 1);
      if (box_rows > 0 && first_box % kWarpSize == 0) {
        pages = next_pages;
        next_pages = page_of_box(first_box + kWarpSize + lane, boxes_per_block);
      }
      const int page = primitives::shfl(pages, (first_box + box) % kWarpSize);
      const int row = box * box_rows;
      const int slot = use_tma ? (first_key + row) % page_size : 0;
      load(keys, kernel_params.k_map, use_tma, slab, row, slot, page, slots);
      load(values, kernel_params.v_map, use_tma, slab, row, slot, page, slots);
      first_box += boxes_per_block;
    }
    for (int i = 0; i < kAhead; i += 2) {
      commit_stage<false>(false, false);
      commit_stage<true>(false, false);
    }
    primitives::cp_async_wait<0>();
  }

 private:
  // The page to request for box number `box` of the split; keys and values share it. TMA zero-fills
  // a page that the cache does not have.
  SA_DEVICE int page_of_box(int box, int boxes_per_block) const {
    const int rows = kernel_params.box_rows;
    const int idx = key_blocks.begin + box / boxes_per_block;
    if (idx >= key_blocks.end) return 0;
    const int key = key_blocks.blocks.block(idx) * kBlockN + box % boxes_per_block * rows;
    const bool is_visible = key < keys.sink_end || (key + rows > keys.begin && key < keys.end);
    if (!is_visible) return static_cast<int>(kernel_params.attn.num_pages);
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    return primitives::load_global(keys.pages + key / page_size);
  }

  SA_DEVICE bool uses_tma(int first_key) const {
    return kernel_params.box_rows > 0 && first_key + kBlockN <= keys.end &&
           is_on_box_edge(keys.begin, first_key) && is_on_box_edge(keys.sink_end, first_key);
  }
  SA_DEVICE bool is_on_box_edge(int key, int first_key) const {
    return key <= first_key || key >= first_key + kBlockN ||
           (key & (kernel_params.box_rows - 1)) == 0;
  }

  // The slots of this lane's keys of block number `idx`; zeros where the block needs none.
  SA_DEVICE KeySlots look_up_slots(int idx) const {
    KeySlots slots{};
    if (idx >= key_blocks.end) return slots;
    const int first_key = key_blocks.blocks.block(idx) * kBlockN;
    const bool has_scales =
        Storage::kUpcasts && (keys.scales != nullptr || values.scales != nullptr);
    if (!has_scales && uses_tma(first_key)) return slots;
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = first_key + i * kWarpSize + lane;
      const int entry = key / page_size;
      slots.slot[i] = key - entry * page_size;
      slots.page[i] = -1;
      if (keys.is_readable(key)) {
        const int page = primitives::load_global(keys.pages + entry);
        if (keys.has_page(page)) slots.page[i] = page;
      }
    }
    return slots;
  }

  // Starts the loads of a block. `slab`, `row`, `slot` and `page` are of this lane's TMA box.
  template <bool kValues>
  SA_DEVICE void load(const KeySource<kValues>& source, const primitives::TensorMap& map,
                      bool use_tma, int slab, int row, int slot, int page, const KeySlots& slots) {
    using Tile = typename Storage::template Tile<kValues>;
    static_assert(kBlockN / 16 * Tile::kSlabs <= kWarpSize, "a lane loads at most one box");
    storage.ring.wait_until_empty(state);
    Tile& tile = storage.template tile<kValues>(state.stage);
    primitives::Mbarrier* full = &storage.ring.full[state.stage];
    bool has_cp_async = !use_tma;
    if constexpr (Storage::kUpcasts) {
      if (source.scales != nullptr) {
        cp_async_scales(source, storage.scales[state.stage], slots);
        has_cp_async = true;
      }
    }
    if (use_tma) {
      if (!has_cp_async && lane == 0) primitives::mbarrier_arrive_expect_tx(full, Tile::kBytes);
      if (slab < Tile::kSlabs) {
        const int first[4] = {slab * (Tile::kSlabBytes / Tiles::kStoredBytes), slot, kv_head, page};
        primitives::tma_load<4>(tile.data + (slab * Tile::kRows + row) * Tile::kSlabBytes, &map,
                                full, first);
      }
    } else {
      cp_async_keys(tile, source, slots);
    }
    state.advance();
    commit_stage<kValues>(has_cp_async, use_tma);
  }

  template <class Tile, bool kValues>
  SA_DEVICE void cp_async_keys(Tile& tile, const KeySource<kValues>& source,
                               const KeySlots& slots) const {
    constexpr int kChunks = Tile::kChunks;
    const int row_bytes = source.dim() * Tiles::kStoredBytes;
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      // Of this lane's key, in 16-byte vectors from the tensor's base: fewer than 2^32 (entry.h).
      const int64_t elements =
          slots.page[i] * source.page_stride() + slots.slot[i] * source.row_stride();
      const uint32_t offset =
          slots.page[i] < 0 ? kUnreadable
                            : static_cast<uint32_t>(elements * Tiles::kStoredBytes / kChunkBytes);
      // The 16-byte vectors of 32 rows, one a lane at a time.
      for (int j = 0; j < kChunks; ++j) {
        const int idx = j * kWarpSize + lane;
        const int chunk = idx % kChunks;
        const uint32_t row_offset = primitives::shfl(offset, idx / kChunks);
        const bool valid = row_offset != kUnreadable && chunk * kChunkBytes < row_bytes;
        const int64_t from = valid ? int64_t{row_offset} + chunk : 0;
        primitives::cp_async_16(tile.chunk(i * kWarpSize + idx / kChunks, chunk),
                                source.base + from * kChunkBytes, valid);
      }
    }
  }

  template <bool kValues>
  SA_DEVICE void cp_async_scales(const KeySource<kValues>& source, float* scales,
                                 const KeySlots& slots) const {
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool valid = slots.page[i] >= 0;
      const int64_t offset = valid ? slots.page[i] * source.scale_stride_page() +
                                         slots.slot[i] * source.scale_stride_slot()
                                   : 0;
      primitives::cp_async_4(scales + i * kWarpSize + lane, source.scales + offset, valid);
    }
  }

  // Commits the latest stage's cp.async group, and signals the stage kAhead before it if that is
  // pending. is_pending: whether the latest stage needs the deferred signal.
  template <bool kValues>
  SA_DEVICE void commit_stage(bool is_pending, bool use_tma) {
    primitives::cp_async_commit();
    pending_mask = pending_mask << 1 | static_cast<uint32_t>(is_pending);
    tma_mask = tma_mask << 1 | static_cast<uint32_t>(use_tma);
    if (started++ < kAhead) return;
    if ((pending_mask >> kAhead & 1) != 0) signal_stage<kValues>();
    signal_state.advance();
  }

  // Waits for the group of the stage kAhead before the latest, and arrives at its `full` barrier.
  template <bool kValues>
  SA_DEVICE void signal_stage() {
    primitives::cp_async_wait<kAhead>();
    primitives::fence_proxy_async();  // TMA may write the stage's next contents
    primitives::sync_warp();
    if (lane == 0) {
      primitives::Mbarrier* full = &storage.ring.full[signal_state.stage];
      if ((tma_mask >> kAhead & 1) != 0) {
        primitives::mbarrier_arrive_expect_tx(full, Storage::template Tile<kValues>::kBytes);
      } else {
        primitives::mbarrier_arrive(full);
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm90
