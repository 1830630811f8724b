// The warp that fills the ring: a split's keys and values, block by block, K 0, V 0, K 1, V 1, ...
//
// A block travels in boxes of its pages, by the copy engine, where pages are made of boxes, none of
// the block's keys lies beyond the sequence and none that no query sees shares a box with one that
// is seen: what such slots hold may be anything. Boxes of unseen keys are asked for beyond the last
// page, which makes them zeros. Other blocks are copied chunk by chunk (cp.async), with zeros for
// what may not be read; so are the scales of tokens. For those a lane looks up where some of the
// block's keys lie, a block ahead, and tells the others.
//
// cp.async has to be waited for by the lanes that started it, before the block is announced. So
// that one such block does not hold up the next ones' copies, it is announced kAhead blocks later:
// a short sequence's copies are all under way before the first is waited for. kAhead is less than
// the stages: all earlier contents of the stage that the warp waits for have then been announced.
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
  // An even number, so that the block announced is one of keys where the latest one is.
  static constexpr int kAhead = Tiles::kStages > 10 ? 8 : (Tiles::kStages - 1) / 2 * 2;
  static_assert(kAhead >= 2 && kAhead < Tiles::kStages && kAhead < 31);
  using Number = std::conditional_t<Tiles::kStoredBytes == 1, uint8_t, uint16_t>;
  using Place = typename Ring<Tiles::kStages>::Place;
  static constexpr int kBlockN = Tiles::kBlockN;
  static constexpr int kWarpSize = primitives::kWarpSize;

  static constexpr int kLaneKeys = kBlockN / kWarpSize;  // of a block, a lane's

  // Where the keys lane, lane + 32, ... of a block lie.
  struct Places {
    int page[kLaneKeys];  // -1: not to be read
    int slot[kLaneKeys];
  };
  static constexpr uint32_t kNowhere = 0xffffffffu;

  const DecodeKernelParams& kernel_params;
  Storage& storage;
  const DecodeWalk& walk;
  const KeySource<false>& keys;
  const KeySource<true>& values;
  int kv_head;
  int lane;

  Place at{};           // the stage of the next block
  Place announce_at{};  // of the block kAhead before the latest
  int started = 0;
  uint32_t owed = 0;     // bit i: the i-th latest block is to be announced kAhead blocks later,
  uint32_t use_tma = 0;  // and comes in boxes

  SA_DEVICE void run() {
    if (kernel_params.box_rows > 0 && lane == 0) {
      primitives::prefetch_tensor_map(&kernel_params.k_map);
      primitives::prefetch_tensor_map(&kernel_params.v_map);
    }
    const int box_rows = kernel_params.box_rows;
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    const int boxes = box_rows == 0 ? 1 : kBlockN / box_rows;  // of a block
    // This lane starts box `box` of slab `slab`.
    const int slab = lane / boxes;
    const int box = lane % boxes;
    // It holds the page of the lane-th box of 32; those of the next 32 are on their way. So are the
    // places of the next block's keys.
    int pages = 0;
    int next_pages = box_rows == 0 ? 0 : page_of_box(lane, boxes);
    int first_box = 0;
    Places places{};
    Places next = look_up(walk.begin);
    for (int idx = walk.begin; idx < walk.end; ++idx) {
      const int first_key = walk.blocks.block(idx) * kBlockN;
      const bool by_engine = uses_tma(first_key);
      places = next;
      next = look_up(idx + 1);
      if (box_rows > 0 && first_box % kWarpSize == 0) {
        pages = next_pages;
        next_pages = page_of_box(first_box + kWarpSize + lane, boxes);
      }
      const int page = primitives::shfl(pages, (first_box + box) % kWarpSize);
      const int row = box * box_rows;
      const int slot = by_engine ? (first_key + row) % page_size : 0;
      load(keys, kernel_params.k_map, by_engine, slab, row, slot, page, places);
      load(values, kernel_params.v_map, by_engine, slab, row, slot, page, places);
      first_box += boxes;
    }
    for (int i = 0; i < kAhead; i += 2) {
      settle<false>(false, false);
      settle<true>(false, false);
    }
    primitives::cp_async_wait<0>();
  }

 private:
  // Where box number `box` of the walk is to be asked for. Keys and values share their pages. Of a
  // page that the cache does not have, the copy engine makes zeros.
  SA_DEVICE int page_of_box(int box, int boxes) const {
    const int rows = kernel_params.box_rows;
    const int idx = walk.begin + box / boxes;
    if (idx >= walk.end) return 0;
    const int key = walk.blocks.block(idx) * kBlockN + box % boxes * rows;
    const bool is_seen = key < keys.sink_end || (key + rows > keys.begin && key < keys.end);
    if (!is_seen) return static_cast<int>(kernel_params.attn.num_pages);
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    return primitives::load_global(keys.pages + key / page_size);
  }

  SA_DEVICE bool uses_tma(int first_key) const {
    return kernel_params.box_rows > 0 && first_key + kBlockN <= keys.end &&
           is_between_boxes(keys.begin, first_key) && is_between_boxes(keys.sink_end, first_key);
  }
  SA_DEVICE bool is_between_boxes(int key, int first_key) const {
    return key <= first_key || key >= first_key + kBlockN ||
           (key & (kernel_params.box_rows - 1)) == 0;
  }

  // The places of block number idx's keys, where they are needed.
  SA_DEVICE Places look_up(int idx) const {
    Places places{};
    if (idx >= walk.end) return places;
    const int first_key = walk.blocks.block(idx) * kBlockN;
    const bool has_scales =
        Storage::kUpcasts && (keys.scales != nullptr || values.scales != nullptr);
    if (!has_scales && uses_tma(first_key)) return places;
    const int page_size = static_cast<int>(kernel_params.attn.page_size);
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = first_key + i * kWarpSize + lane;
      const int entry = key / page_size;
      places.slot[i] = key - entry * page_size;
      places.page[i] = -1;
      if (keys.is_readable(key)) {
        const int page = primitives::load_global(keys.pages + entry);
        if (keys.has_page(page)) places.page[i] = page;
      }
    }
    return places;
  }

  // Starts the copies of a block; of boxes, `slab`, `row`, `slot` and `page` are this lane's.
  template <bool kValues>
  SA_DEVICE void load(const KeySource<kValues>& source, const primitives::TensorMap& map,
                      bool by_engine, int slab, int row, int slot, int page, const Places& places) {
    using Tile = typename Storage::template Tile<kValues>;
    static_assert(kBlockN / 16 * Tile::kSlabs <= kWarpSize, "a lane starts one box");
    storage.ring.wait_until_empty(at);
    Tile& tile = storage.template tile<kValues>(at.stage);
    primitives::Mbarrier* full = &storage.ring.full[at.stage];
    bool has_chunks = !by_engine;
    if constexpr (Storage::kUpcasts) {
      if (source.scales != nullptr) {
        copy_scales(source, storage.scales[at.stage], places);
        has_chunks = true;
      }
    }
    if (by_engine) {
      if (!has_chunks && lane == 0) primitives::mbarrier_arrive_expect_tx(full, Tile::kBytes);
      if (slab < Tile::kSlabs) {
        const int first[4] = {slab * (Tile::kSlabBytes / Tiles::kStoredBytes), slot, kv_head, page};
        primitives::tma_load<4>(tile.data + (slab * Tile::kRows + row) * Tile::kSlabBytes, &map,
                                full, first);
      }
    } else {
      copy_chunks(tile, source, places);
    }
    at.advance();
    settle<kValues>(has_chunks, by_engine);
  }

  template <class Tile, bool kValues>
  SA_DEVICE void copy_chunks(Tile& tile, const KeySource<kValues>& source,
                             const Places& places) const {
    constexpr int kChunks = Tile::kChunks;
    const int row_bytes = source.dim() * Tiles::kStoredBytes;
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      // Of this lane's key, in chunks from the tensor's first; they are fewer than 2^32 (entry.h).
      const int64_t numbers =
          places.page[i] * source.page_stride() + places.slot[i] * source.row_stride();
      const uint32_t offset =
          places.page[i] < 0 ? kNowhere
                             : static_cast<uint32_t>(numbers * Tiles::kStoredBytes / kChunkBytes);
      // 32 rows, whose chunks the lanes take in turn.
      for (int j = 0; j < kChunks; ++j) {
        const int number = j * kWarpSize + lane;
        const int chunk = number % kChunks;
        const uint32_t row_offset = primitives::shfl(offset, number / kChunks);
        const bool valid = row_offset != kNowhere && chunk * kChunkBytes < row_bytes;
        const int64_t from = valid ? int64_t{row_offset} + chunk : 0;
        primitives::cp_async_16(tile.chunk(i * kWarpSize + number / kChunks, chunk),
                                source.base + from * kChunkBytes, valid);
      }
    }
  }

  template <bool kValues>
  SA_DEVICE void copy_scales(const KeySource<kValues>& source, float* scales,
                             const Places& places) const {
    SA_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool valid = places.page[i] >= 0;
      const int64_t offset = valid ? places.page[i] * source.scale_stride_page() +
                                         places.slot[i] * source.scale_stride_slot()
                                   : 0;
      primitives::cp_async_4(scales + i * kWarpSize + lane, source.scales + offset, valid);
    }
  }

  // Notes how a block is to be announced, and announces the one kAhead blocks before it, if that
  // is still owed.
  template <bool kValues>
  SA_DEVICE void settle(bool is_owed, bool by_engine) {
    primitives::cp_async_commit();
    owed = owed << 1 | static_cast<uint32_t>(is_owed);
    use_tma = use_tma << 1 | static_cast<uint32_t>(by_engine);
    if (started++ < kAhead) return;
    if ((owed >> kAhead & 1) != 0) {
      primitives::cp_async_wait<kAhead>();
      primitives::fence_proxy_async();  // the stage's next contents may come from the copy engine
      primitives::sync_warp();
      if (lane == 0) {
        primitives::Mbarrier* full = &storage.ring.full[announce_at.stage];
        if ((use_tma >> kAhead & 1) != 0) {
          primitives::mbarrier_arrive_expect_tx(full, Storage::template Tile<kValues>::kBytes);
        } else {
          primitives::mbarrier_arrive(full);
        }
      }
    }
    announce_at.advance();
  }
};

}  // namespace sink_attention::cuda::sm90
