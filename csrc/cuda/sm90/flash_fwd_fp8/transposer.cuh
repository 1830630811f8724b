// The warps that transpose V, between the producer and the consumers. The last of them, which has
// the fewest columns, is the scheduler too.
//
// A transposing ldmatrix reads matrices of 8 keys x 8 pairs of columns. Lane l then holds, of pair
// l / 4, keys 2 t and 2 t + 1, with t = l % 4. Two such matrices cover 16 keys. Their two registers
// hold the four keys k = 4 t ... 4 t + 3 (to_float8_operands). Every other byte is of the even
// column, the others are of the odd one:
//
//     key      2t     2t + 1   8 + 2t  8 + 2t + 1
//     column  e   o   e   o     e   o   e   o
//     byte    0   1   2   3     4   5   6   7
//
// Lanes of the upper four pairs store the odd column first. The rows that a warp stores to at once
// then lie in different banks.
#pragma once

#include "cuda/sm90/flash_fwd/scheduler.cuh"
#include "cuda/sm90/flash_fwd_fp8/storage.cuh"
#include "primitives/ldmatrix.h"
#include "primitives/upcast.h"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashFwdTransposer {
  using Storage = FlashFwdStorage<Element, Tiles>;
  using Loaded = typename Storage::LoadedVTile;
  using Transposed = typename Storage::VTile;
  static constexpr uint32_t kEvenBytes = 0x6420;
  static constexpr uint32_t kOddBytes = 0x7531;
  static constexpr int kReadKeys = 32;  // by one ldmatrix: four matrices
  static_assert(Tiles::kBlockN % kReadKeys == 0, "whole reads");
  // Tiles scheduled beyond the one that is transposed: enough for the producer, and few enough that
  // their slots are empty by then.
  static constexpr int kTilesAhead = kWorkTileSlots / 2;

  const FlashFwdKernelParams& params;
  Storage& storage;

  SA_DEVICE void run() {
    FlashFwdScheduler<Element, Tiles> scheduler{params, storage};
    WorkTileIndex tile_idx;
    typename Ring<Tiles::kStages>::PipelineState v_state;  // of both rings
    const bool is_scheduler = primitives::warp_idx() % 4 == kTransposingWarps;
    for (;; storage.work_tiles.release(tile_idx)) {
      if (is_scheduler) {
        SA_ROLLED
        for (int i = 0; i < 2; ++i) {  // at most two, since its own tile waits
          if (scheduler.tile_idx.index > tile_idx.index + kTilesAhead) break;
          scheduler.write_next();
        }
      }
      if (!storage.work_tiles.wait_for(tile_idx)) break;
      const int count = key_blocks_of(storage.work_tiles.tile[tile_idx.slot()]).count();
      SA_ROLLED
      for (int block = 0; block < count; ++block) {
        storage.v_loaded_ring.wait_until_full(v_state);
        storage.v_ring.wait_until_empty(v_state);
        transpose(storage.v_loaded[v_state.stage], storage.v[v_state.stage]);
        primitives::fence_proxy_async();  // wgmma reads V^T
        primitives::sync_warp();
        if (primitives::lane_idx() == 0) {
          primitives::mbarrier_arrive(&storage.v_loaded_ring.empty[v_state.stage]);
          primitives::mbarrier_arrive(&storage.v_ring.full[v_state.stage]);
        }
        v_state.advance();
      }
    }
  }

 private:
  // Transposes this warp's share: every third 16-byte vector of columns.
  SA_DEVICE void transpose(const Loaded& from, Transposed& to) const {
    const int lane = primitives::rematerialise_lane_idx();
    const bool odd_first = lane >= 16;
    SA_ROLLED
    for (int chunk = primitives::warp_idx() % 4 - 1; chunk < Loaded::kChunks;
         chunk += kTransposingWarps) {
      uint32_t keys[Tiles::kBlockN / kReadKeys][4];
      SA_UNROLL
      for (int read = 0; read < Tiles::kBlockN / kReadKeys; ++read) {
        primitives::ldmatrix_x4_trans(keys[read], from.chunk(kReadKeys * read + lane, chunk));
      }
      const int even = 16 * chunk + lane / 4 * 2;
      SA_UNROLL
      for (int pass = 0; pass < 2; ++pass) {
        const int odd = odd_first != (pass == 1);
        SA_UNROLL
        for (int keys16 = 0; keys16 < Tiles::kBlockN / 16; ++keys16) {
          const uint32_t (&pair)[4] = keys[keys16 / 2];
          const int first = keys16 % 2 * 2;
          const uint32_t four = primitives::select_bytes(pair[first], pair[first + 1],
                                                         odd != 0 ? kOddBytes : kEvenBytes);
          primitives::store_shared(
              reinterpret_cast<uint32_t*>(to.chunk(even + odd, keys16)) + lane % 4, four);
        }
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm90
