// The warp that writes works ahead of all others (work_tile.cuh).
#pragma once

#include "attention/mask.h"
#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"

namespace sink_attention::cuda::sm90 {

// A work is written in steps, each of which reads again what the ones before it left, so that few
// registers do.
template <class Element, class Tiles>
struct FlashFwdScheduler {
  using Storage = FlashFwdStorage<Element, Tiles>;

  const FlashFwdKernelParams& kernel_params;
  Storage& storage;
  WorkPlace at{};
  int round = 0;  // the works of those before it are written, or have no rows; -1: the end is

  SA_DEVICE void run() {
    while (round >= 0) write_next();
  }

  // Writes the next work that has rows, or that none is left; after that, nothing. Waits until the
  // work kWorkSlots before it has been read. All lanes call.
  SA_DEVICE void write_next() {
    if (round < 0) return;
    storage.works.ring.wait_until_empty(at.in_ring());
    if (write_place()) write_details();
    primitives::sync_warp();
    if (is_first_lane()) primitives::mbarrier_arrive(&storage.works.ring.full[at.slot()]);
    ++at.number;
  }

 private:
  struct Place {
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
  SA_DEVICE Work<Tiles::kConsumers>& work() const { return storage.works.work[at.slot()]; }

  // The number of this block's work in a round.
  SA_DEVICE static int64_t work_of_round(int round) {
    const int blocks = primitives::grid_dim().x;
    const int block = primitives::block_idx().x;
    return int64_t{round} * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }

  // Writes where the next work with rows lies, which lanes look for in a round each; whether there
  // is one. Packed sequences have as many works as if all were as long as the longest.
  SA_DEVICE bool write_place() {
    const int lane = primitives::lane_idx();
    for (; work_of_round(round) < kernel_params.num_works; round += primitives::kWarpSize) {
      const int64_t idx = work_of_round(round + lane);
      Place place{};
      bool has_rows = false;
      if (idx < kernel_params.num_works) {
        place = place_of(static_cast<int>(idx));
        has_rows = place.row_begin < info_of(place).seqlen_q * kernel_params.qhead_per_khead;
      }
      const int first = primitives::first_lane(has_rows);
      if (first == primitives::kWarpSize) continue;
      if (lane == first) write(place);
      primitives::sync_warp();
      round += first + 1;
      return true;
    }
    if (is_first_lane()) store(work().num_rows, 0);
    round = -1;
    return false;
  }

  SA_DEVICE Place place_of(int idx) const {
    const int num_heads = static_cast<int>(kernel_params.attn.num_heads_kv);
    const int all = kernel_params.num_works / kernel_params.num_tiles;
    const int section = idx / (kernel_params.section * kernel_params.num_tiles);
    const int first = section * kernel_params.section;
    const int count = kernel_params.section < all - first ? kernel_params.section : all - first;
    const int in_section = idx - first * kernel_params.num_tiles;
    const int rank = in_section / count;
    const int rest = first + in_section - rank * count;
    const int batch_idx = rest / num_heads;
    return {batch_idx, rest - batch_idx * num_heads,
            (kernel_params.num_tiles - 1 - rank) * Tiles::kBlockM};
  }
  SA_DEVICE attention::SeqlenInfo info_of(const Place& place) const {
    return attention::seqlen_info(kernel_params.attn, place.batch_idx);
  }

  SA_DEVICE void write(const Place& place) const {
    const attention::SeqlenInfo info = info_of(place);
    const int seqlen_q = static_cast<int>(info.seqlen_q);
    store(work().num_rows, seqlen_q * kernel_params.qhead_per_khead);
    store(work().row_begin, place.row_begin);
    store(work().position, place.row_begin / kernel_params.qhead_per_khead);
    store(work().kv_head, place.kv_head);
    store(work().batch_idx, place.batch_idx);
    store(work().seqlen_q, seqlen_q);
    store(work().seqlen_k, static_cast<int>(info.seqlen_k));
    store(work().q_batch, static_cast<int>(info.q_batch));
    store(work().q_row, static_cast<int>(info.q_row));
    store(work().k_batch, static_cast<int>(info.k_batch));
    store(work().k_row, static_cast<int>(info.k_row));
  }

  SA_DEVICE void write_details() const {
    if (is_first_lane()) {
      storage.write_scale(kernel_params, at.slot());
      write_blocks();
    }
    primitives::sync_warp();
    if (blocks_of_work(work()).count() == 0) return;
    if (primitives::lane_idx() < Tiles::kConsumers) write_full(primitives::lane_idx());
    primitives::sync_warp();
    if (is_first_lane()) write_loaded();
    primitives::sync_warp();
    if (is_first_lane()) store(work().k_base, source<false>().base);
    primitives::sync_warp();
    if (is_first_lane()) {
      store(work().v_base, source<true>().base);
      store(work().pages, source<true>().pages);
    }
  }

  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(kernel_params.attn, load(work().seqlen_q), load(work().seqlen_k));
  }
  // Of a row of the tile, or of the sequence's last one, if that comes before.
  SA_DEVICE int position(int row) const {
    const int packed_row = load(work().row_begin) + row;
    const int last = load(work().num_rows) - 1;
    return (packed_row < last ? packed_row : last) / kernel_params.qhead_per_khead;
  }

  SA_DEVICE void write_blocks() const {
    const attention::KeySet visible =
        mask().visible_keys(load(work().position), position(Tiles::kBlockM - 1) + 1);
    const attention::BlockList<int> blocks = attention::blocks_of(visible, Tiles::kBlockN);
    store(work().blocks.sink_end, blocks.sink_end);
    store(work().blocks.begin, blocks.begin);
    store(work().blocks.end, blocks.end);
  }

  SA_DEVICE void write_full(int warpgroup) const {
    const attention::Range full =
        mask().keys_seen_by_all(position(64 * warpgroup), position(64 * warpgroup + 63) + 1);
    BlockRange& blocks = work().full[warpgroup];
    store(blocks.begin, (static_cast<int>(full.begin) + Tiles::kBlockN - 1) / Tiles::kBlockN);
    store(blocks.end, static_cast<int>(attention::max_of(full.end, 0)) / Tiles::kBlockN);
  }

  // The keys that some query of the sequence sees. Those that only other tiles' rows see are there
  // too: boxes need not end where this tile's rows do.
  SA_DEVICE void write_loaded() const {
    const attention::KeySet keys = mask().visible_keys(0, load(work().seqlen_q));
    store(work().sink_end, static_cast<int>(keys.sink_end));
    store(work().key_begin, static_cast<int>(keys.window.begin));
    store(work().key_end, static_cast<int>(keys.window.end));
  }

  template <bool kValues>
  SA_DEVICE KeySource<kValues> source() const {
    attention::SeqlenInfo info{};
    info.k_batch = load(work().k_batch);
    info.k_row = load(work().k_row);
    return key_source<kValues>(kernel_params.attn, load(work().batch_idx), load(work().kv_head),
                               info, {0, {0, 0}});
  }
};

}  // namespace sink_attention::cuda::sm90
