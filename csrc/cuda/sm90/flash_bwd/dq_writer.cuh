// The thread that adds a backward block's dQ, tile after tile, to the accumulator that all blocks
// share; in the order of the blocks of keys if turns are kept. A block only waits for those of its
// sequence and kv head before it, which have a lower index and started earlier (params.h).
#pragma once

#include "cuda/sm90/flash_bwd/block.cuh"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "primitives/atomic.h"
#include "primitives/bulk.h"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashBwdDqWriter {
  using Storage = FlashBwdStorage<Element, Tiles>;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kTileFloats = kBlockM * Tiles::kHeadDim;

  const FlashBwdKernelParams& params;
  const FlashBwdBlock<Tiles> block;
  Storage& storage;

  SA_DEVICE void run() {
    typename Ring<1>::Place at;
    for (int tile = block.tiles_end() - 1; tile >= block.tiles_begin(); --tile) {
      storage.dq_ring.wait_until_full(at);
      add(tile);
      at.advance();
    }
    primitives::bulk_wait<0>();
  }

 private:
  SA_DEVICE void add(int tile) {
    const int64_t at = block.workspace_tile(tile);
    int* turns = params.workspace.turns;
    const int mine = turns == nullptr ? 0 : block.turn_at(tile);
    if (turns != nullptr) {
      primitives::semaphore_wait(turns + at, mine);
      primitives::fence_proxy_async_global();
    }
    // Fragments of 16 rows follow each other; those without a row hold zeros.
    const int rows = (block.rows_of(tile) + 15) / 16 * 16;
    primitives::bulk_reduce_add(params.workspace.dq + at * kTileFloats, storage.dq,
                                rows * Tiles::kHeadDim * static_cast<int>(sizeof(float)));
    primitives::bulk_commit();
    primitives::bulk_wait_read<0>();
    primitives::mbarrier_arrive(&storage.dq_ring.empty[0]);
    if (turns == nullptr) return;
    primitives::bulk_wait<0>();  // added: the next block may
    primitives::semaphore_release(turns + at, mine + 1);
  }
};

}  // namespace sink_attention::cuda::sm90
