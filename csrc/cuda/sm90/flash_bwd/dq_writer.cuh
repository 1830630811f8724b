// The dQ writer: one thread that adds each tile's dQ to the accumulator that all CTAs share.
//
// With deterministic=True the dQ semaphore orders the additions of a tile by block of keys. A CTA
// waits only for earlier blocks of its sequence and kv head. These have lower CTA indices and
// started earlier (device/block_order.h).
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
    typename Ring<1>::PipelineState state;
    for (int tile = block.tiles_end() - 1; tile >= block.tiles_begin(); --tile) {
      storage.dq_ring.wait_until_full(state);
      add(tile);
      state.advance();
    }
    primitives::bulk_wait<0>();
  }

 private:
  SA_DEVICE void add(int tile) {
    const int64_t workspace_tile = block.workspace_tile(tile);
    int* dq_semaphores = params.workspace.dq_semaphores;
    const int own_value = dq_semaphores == nullptr ? 0 : block.dq_semaphore_value(tile);
    if (dq_semaphores != nullptr) {
      primitives::semaphore_wait(dq_semaphores + workspace_tile, own_value);
      primitives::fence_proxy_async_global();
    }
    // The accumulator consists of fragments of 16 rows. Fragments beyond the sequence hold zeros.
    const int rows = (block.rows_of(tile) + 15) / 16 * 16;
    primitives::bulk_reduce_add(params.workspace.dq + workspace_tile * kTileFloats, storage.dq,
                                rows * Tiles::kHeadDim * static_cast<int>(sizeof(float)));
    primitives::bulk_commit();
    primitives::bulk_wait_read<0>();
    primitives::mbarrier_arrive(&storage.dq_ring.empty[0]);
    if (dq_semaphores == nullptr) return;
    primitives::bulk_wait<0>();  // the sums are visible before the next block adds
    primitives::semaphore_release(dq_semaphores + workspace_tile, own_value + 1);
  }
};

}  // namespace sink_attention::cuda::sm90
