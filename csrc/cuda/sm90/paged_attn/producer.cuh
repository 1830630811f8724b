// The warp that fills the ring: a split's keys and values, block by block, K 0, V 0, K 1, V 1, ...
//
// A block travels in boxes of its pages, by the copy engine, where pages are made of boxes, none of
// the block's keys lies beyond the sequence and none that no query sees shares a box with one that
// is seen: what such slots hold may be anything. Boxes of unseen keys are asked for beyond the last
// page, which makes them zeros. Other blocks are copied chunk by chunk (cp.async), with zeros for
// what may not be read; so are the scales of tokens.
//
// cp.async has to be waited for by the lanes that started it, before the block is announced. So
// that one such block does not hold up the next ones' copies, it is announced kAhead blocks later:
// a short sequence's copies are all under way before the first is waited for. kAhead is less than
// the stages: all earlier contents of the stage that the warp waits for have then been announced.
#pragma once

#include "cuda/sm90/paged_attn/problem.h"
#include "cuda/sm90/paged_attn/storage.cuh"
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

  const DecodeKernelProblem& kernel_problem;
  Storage& storage;
  const DecodeWalk& walk;
  const KeySource<false>& keys;
  const KeySource<true>& values;
  int kv_head;
  int lane;

  Place at{};           // the stage of the next block
  Place announce_at{};  // of the block kAhead before the latest
  int started = 0;
  uint32_t owed = 0;      // bit i: the i-th latest block is to be announced kAhead blocks later,
  uint32_t in_boxes = 0;  // and comes in boxes

  SA_DEVICE void run() {
    const int boxes =
        kernel_problem.box_rows == 0 ? 0 : kBlockN / kernel_problem.box_rows;  // of a block
    // Lane l holds the page of box l of 32; the next 32 are on their way.
    int pages = 0;
    int next_pages = boxes == 0 ? 0 : page_of_box(lane, boxes);
    int box = 0;
    for (int idx = walk.begin; idx < walk.end; ++idx) {
      if (boxes > 0 && box % kWarpSize == 0) {
        pages = next_pages;
        next_pages = page_of_box(box + kWarpSize + lane, boxes);
      }
      const int first_key = walk.blocks.block(idx) * kBlockN;
      const int page = primitives::shfl(pages, (box + (boxes == 0 ? 0 : lane % boxes)) % kWarpSize);
      load(keys, kernel_problem.k_map, first_key, boxes, page);
      load(values, kernel_problem.v_map, first_key, boxes, page);
      box += boxes;
    }
    for (int i = 0; i < kAhead; i += 2) {
      settle<false>(false, false);
      settle<true>(false, false);
    }
    primitives::cp_async_wait<0>();
  }

 private:
  // Where box number `box` of the walk is to be asked for. Keys and values share their pages.
  SA_DEVICE int page_of_box(int box, int boxes) const {
    const int rows = kernel_problem.box_rows;
    const int idx = walk.begin + box / boxes;
    if (idx >= walk.end) return 0;
    const int key = walk.blocks.block(idx) * kBlockN + box % boxes * rows;
    const bool is_seen = key < keys.sink_end || (key + rows > keys.begin && key < keys.end);
    if (!is_seen) return static_cast<int>(kernel_problem.problem.num_pages);
    const int page_size = static_cast<int>(kernel_problem.problem.page_size);
    return primitives::load_global(keys.pages + key / page_size);
  }

  SA_DEVICE bool is_between_boxes(int key, int first_key) const {
    return key <= first_key || key >= first_key + kBlockN || key % kernel_problem.box_rows == 0;
  }

  // Starts the copies of a block. `page`: of box lane % boxes.
  template <bool kValues>
  SA_DEVICE void load(const KeySource<kValues>& source, const primitives::TensorMap& map,
                      int first_key, int boxes, int page) {
    storage.ring.wait_until_empty(at);
    auto& tile = storage.template tile<kValues>(at.stage);
    primitives::Mbarrier* full = &storage.ring.full[at.stage];
    const bool by_engine = boxes > 0 && first_key + kBlockN <= source.end &&
                           is_between_boxes(source.begin, first_key) &&
                           is_between_boxes(source.sink_end, first_key);
    bool has_chunks = !by_engine;
    if constexpr (Storage::kWidens) {
      if (source.scales != nullptr) {
        copy_scales(source, storage.scales[at.stage], first_key);
        has_chunks = true;
      }
    }
    if (by_engine) {
      if (!has_chunks && lane == 0) primitives::mbarrier_arrive_expect_tx(full, tile.kBytes);
      start_boxes(tile, map, first_key, boxes, page, full);
    } else {
      copy_chunks(tile, source, first_key);
    }
    at.advance();
    settle<kValues>(has_chunks, by_engine);
  }

  template <class Tile>
  SA_DEVICE void start_boxes(Tile& tile, const primitives::TensorMap& map, int first_key, int boxes,
                             int page, primitives::Mbarrier* full) const {
    static_assert(kBlockN / 16 * Tile::kSlabs <= kWarpSize, "a lane starts one box");
    const int slab = lane / boxes;
    if (slab >= Tile::kSlabs) return;
    const int row = lane % boxes * kernel_problem.box_rows;
    const int page_size = static_cast<int>(kernel_problem.problem.page_size);
    const int at[4] = {slab * (Tile::kSlabBytes / Tiles::kStoredBytes),
                       (first_key + row) % page_size, kv_head, page};
    primitives::tma_load<4>(tile.data + (slab * Tile::kRows + row) * Tile::kSlabBytes, &map, full,
                            at);
  }

  template <class Tile, bool kValues>
  SA_DEVICE void copy_chunks(Tile& tile, const KeySource<kValues>& source, int first_key) const {
    constexpr int kCount = Tile::kRows * Tile::kChunks;
    static_assert(kCount % (4 * kWarpSize) == 0);
    const int row_bytes = source.dim() * Tiles::kStoredBytes;
    // Four at a time, so that their pages are looked up together.
    for (int i = lane; i < kCount; i += 4 * kWarpSize) {
      const Number* numbers[4];
      SA_UNROLL
      for (int j = 0; j < 4; ++j) {
        numbers[j] = source.template row<Number>(first_key + (i + j * kWarpSize) / Tile::kChunks);
      }
      SA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = (i + j * kWarpSize) / Tile::kChunks;
        const int chunk = (i + j * kWarpSize) % Tile::kChunks;
        const bool valid = numbers[j] != nullptr && chunk * kChunkBytes < row_bytes;
        const char* bytes =
            valid ? reinterpret_cast<const char*>(numbers[j]) + chunk * kChunkBytes : source.base;
        primitives::cp_async_16(tile.chunk(row, chunk), bytes, valid);
      }
    }
  }

  template <bool kValues>
  SA_DEVICE void copy_scales(const KeySource<kValues>& source, float* scales, int first_key) const {
    const int page_size = static_cast<int>(kernel_problem.problem.page_size);
    SA_UNROLL
    for (int i = 0; i < kBlockN; i += kWarpSize) {
      const int key = first_key + i + lane;
      const bool valid = source.is_readable(key);
      const float* scale = source.scales;
      if (valid) {
        const int page = key / page_size;
        scale += primitives::load_global(source.pages + page) * source.scale_stride_page() +
                 (key - page * page_size) * source.scale_stride_slot();
      }
      primitives::cp_async_4(scales + i + lane, scale, valid);
    }
  }

  // Notes how a block is to be announced, and announces the one kAhead blocks before it, if that
  // is still owed.
  template <bool kValues>
  SA_DEVICE void settle(bool is_owed, bool by_engine) {
    primitives::cp_async_commit();
    owed = owed << 1 | static_cast<uint32_t>(is_owed);
    in_boxes = in_boxes << 1 | static_cast<uint32_t>(by_engine);
    if (started++ < kAhead) return;
    if ((owed >> kAhead & 1) != 0) {
      primitives::cp_async_wait<kAhead>();
      primitives::fence_proxy_async();  // the stage's next contents may come from the copy engine
      primitives::sync_warp();
      if (lane == 0) {
        primitives::Mbarrier* full = &storage.ring.full[announce_at.stage];
        if ((in_boxes >> kAhead & 1) != 0) {
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
