// The warps that transpose V between the one that copies it and those that compute. The last of
// them, which has the fewest columns, also writes works ahead.
//
// A matrix of 8 keys and 8 pairs of columns, read by ldmatrix transposed, leaves in lane l of pair
// l / 4 the keys 2 t and 2 t + 1, t = l % 4. Two such matrices of 16 keys have the four keys of
// places 4 t ... 4 t + 3 (to_float8_operands) in two registers, and of these every other byte is of
// the even column, the others of the odd one:
//
//     key      2t     2t + 1   8 + 2t  8 + 2t + 1
//     column  e   o   e   o     e   o   e   o
//     byte    0   1   2   3     4   5   6   7
//
// Lanes of the upper four pairs store the odd column first: the rows that a warp stores to at once
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
  using Copied = typename Storage::LoadedVTile;
  using Transposed = typename Storage::VTile;
  static constexpr uint32_t kEvenBytes = 0x6420;
  static constexpr uint32_t kOddBytes = 0x7531;
  static constexpr int kReadKeys = 32;  // by one ldmatrix: four matrices
  static_assert(Tiles::kBlockN % kReadKeys == 0, "whole reads");
  // Beyond its own: enough for the warp that copies, few enough that slots are empty by then.
  static constexpr int kWorksAhead = kWorkSlots / 2;

  const FlashFwdKernelParams& params;
  Storage& storage;

  SA_DEVICE void run() {
    FlashFwdScheduler<Element, Tiles> scheduler{params, storage};
    WorkPlace work_at;
    typename Ring<Tiles::kStages>::Place at;  // in both rings
    const bool writes_works = primitives::warp_idx() % 4 == kTransposingWarps;
    for (;; storage.works.release(work_at)) {
      if (writes_works) {
        SA_ROLLED
        for (int i = 0; i < 2; ++i) {  // not all at once in the beginning: its own work waits
          if (scheduler.at.number > work_at.number + kWorksAhead) break;
          scheduler.write_next();
        }
      }
      if (!storage.works.wait_for(work_at)) break;
      const int count = blocks_of_work(storage.works.work[work_at.slot()]).count();
      SA_ROLLED
      for (int block = 0; block < count; ++block) {
        storage.copied_v_ring.wait_until_full(at);
        storage.v_ring.wait_until_empty(at);
        transpose(storage.copied_v[at.stage], storage.v[at.stage]);
        primitives::fence_proxy_async();  // products read V^T
        primitives::sync_warp();
        if (primitives::lane_idx() == 0) {
          primitives::mbarrier_arrive(&storage.copied_v_ring.empty[at.stage]);
          primitives::mbarrier_arrive(&storage.v_ring.full[at.stage]);
        }
        at.advance();
      }
    }
  }

 private:
  // This warp's share: every third chunk of 16 columns.
  SA_DEVICE void transpose(const Copied& from, Transposed& to) const {
    const int lane = primitives::rematerialise_lane_idx();
    const bool odd_first = lane >= 16;
    SA_ROLLED
    for (int chunk = primitives::warp_idx() % 4 - 1; chunk < Copied::kChunks;
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
        for (int qhead_per_khead = 0; qhead_per_khead < Tiles::kBlockN / 16;
             ++qhead_per_khead) {  // of 16 keys
          const uint32_t (&pair)[4] = keys[qhead_per_khead / 2];
          const int first = qhead_per_khead % 2 * 2;
          const uint32_t four = primitives::select_bytes(pair[first], pair[first + 1],
                                                         odd != 0 ? kOddBytes : kEvenBytes);
          primitives::store_shared(
              reinterpret_cast<uint32_t*>(to.chunk(even + odd, qhead_per_khead)) + lane % 4, four);
        }
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm90
