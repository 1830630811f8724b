// The backward of one block of keys of one kv head on Hopper: dK and dV of the block, summed over
// the tiles of query rows that see some of it; each tile's dQ is added to a float32 accumulator
// that all blocks share.
//
//   S^T  = K Q^T        P  = exp2(S softmax_scale_log2 - lse_log2)          keys are the products' rows, so
//   dP^T = V dO^T       dS = P (dP - delta) (softcap's slope)    that P^T and dS^T are operands A
//   dV  += P^T dO       dK += dS^T Q         dQ += dS K          (softmax_scale comes at the end)
//
// Rows are (position, head of the group) pairs (pack_gqa.cuh), so the sum over a kv head's query
// heads is part of the products. Which block of keys a thread block has: params.h. Tiles are taken
// from the last to the first, by three kinds of warps that go on in their own pace:
//
//   loaders    2 warps       K, then Q and lse of each tile, as the ring has room; V, then dO and
//                            delta
//   consumers  2 warpgroups  the products, and all between them (consumer.cuh)
//   dQ writer  one thread    adds what consumers leave of dQ in shared memory
#pragma once

#include "cuda/sm90/flash_bwd/block.cuh"
#include "cuda/sm90/flash_bwd/consumer.cuh"
#include "cuda/sm90/flash_bwd/dq_writer.cuh"
#include "cuda/sm90/flash_bwd/loader.cuh"
#include "cuda/sm90/flash_bwd/storage.cuh"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashBwdKernel {
  using Params = FlashBwdKernelParams;
  using Storage = FlashBwdStorage<Element, Tiles>;
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(Storage));
  };
  static_assert(Config::kSharedBytes <= 227 * 1024, "what a block may have");

  static SA_DEVICE void run(const Params& params, char* shared) {
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    const FlashBwdBlock<Tiles> block{params, storage.info};
    const int warp = primitives::warp_idx();
    if (primitives::thread_idx() == 0) {
      block.describe(storage.info);
      init_barriers(storage);
    }
    if (primitives::thread_idx() == primitives::kWarpSize) prefetch_maps(params);
    primitives::sync_threads();  // all threads know the block, and may use its barriers
    if (block.num_keys() <= 0) return;
    const int warpgroup = primitives::warpgroup_idx();
    if (warpgroup > 0) {
      primitives::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      FlashBwdConsumer<Element, Tiles>(params, storage, warpgroup - 1).run();
      return;
    }
    primitives::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    if (block.tiles_begin() >= block.tiles_end()) return;
    if (warp == 0) {
      FlashBwdLoader<Element, Tiles, false>{params, block, storage}.run();
    } else if (warp == 1) {
      FlashBwdLoader<Element, Tiles, true>{params, block, storage}.run();
    } else if (warp == 2 && primitives::lane_idx() == 0) {
      FlashBwdDqWriter<Element, Tiles>{params, block, storage}.run();
    }
  }

  static SA_DEVICE void prefetch_maps(const Params& params) {
    if (params.has_k_map) primitives::prefetch_tensor_map(&params.k_map);
    if (params.has_q_map) primitives::prefetch_tensor_map(&params.q_map);
    if (params.has_v_map) primitives::prefetch_tensor_map(&params.v_map);
    if (params.has_dout_map) primitives::prefetch_tensor_map(&params.dout_map);
  }
  static SA_DEVICE void init_barriers(Storage& storage) {
    storage.q_ring.init(kTileArrivals, Tiles::kConsumerWarps);
    storage.dout_ring.init(kTileArrivals, Tiles::kConsumerWarps);
    storage.dq_ring.init(Tiles::kConsumerWarps, 1);
    primitives::mbarrier_init(&storage.k_full, kLoadArrivals);
    primitives::mbarrier_init(&storage.v_full, kLoadArrivals);
    primitives::mbarrier_init(&storage.q_landed, 1);
    primitives::mbarrier_init(&storage.dout_landed, 1);
    primitives::fence_mbarrier_init();
  }
};

}  // namespace sink_attention::cuda::sm90
