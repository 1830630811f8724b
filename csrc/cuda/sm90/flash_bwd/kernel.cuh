// The backward on Hopper. A CTA has one block of keys of one kv head. It computes the block's dK
// and dV, summed over the tiles of query rows that see some of its keys. Each tile's dQ is added to
// a float32 accumulator that all CTAs share.
//
//   S^T  = K Q^T        P  = exp2(S softmax_scale_log2 - lse_log2)
//   dP^T = V dO^T       dS = P (dP - delta)        times the softcap's slope
//   dV  += P^T dO       dK += dS^T Q               softmax_scale is applied at the end
//   dQ  += dS K
//
// The products' rows are keys, so P^T and dS^T are operands A as they lie in registers. Tile rows
// are PackGQA rows (pack_gqa.cuh), so the sum over the query heads of a kv head is part of the
// products. params.h says which block of keys a CTA has. Tiles are visited from the last to the
// first. Three kinds of warps proceed independently:
//
//   loaders    2 warps       one loads K, then Q and lse of each tile; the other loads V, then dO
//                            and delta; each as far ahead as its ring has room
//   consumers  2 warpgroups  the products and all between them (consumer.cuh)
//   dQ writer  1 thread      adds each dQ that the consumers store in shared memory (dq_writer.cuh)
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
  static_assert(Config::kSharedBytes <= 227 * 1024,
                "shared memory of a CTA on compute capability 9.0");

  static SA_DEVICE void run(const Params& params, char* shared) {
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    const FlashBwdBlock<Tiles> block{params, storage.info};
    const int warp = primitives::warp_idx();
    if (primitives::thread_idx() == 0) {
      block.init_info(storage.info);
      init_barriers(storage);
    }
    if (primitives::thread_idx() == primitives::kWarpSize) prefetch_maps(params);
    primitives::sync_threads();  // the info and the barriers are initialised
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
    primitives::mbarrier_init(&storage.q_tail_full, 1);
    primitives::mbarrier_init(&storage.dout_tail_full, 1);
    primitives::fence_mbarrier_init();
  }
};

}  // namespace sink_attention::cuda::sm90
