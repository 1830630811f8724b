// The forward on Hopper: warpgroups that compute, fed by one that copies.
//
// Thread blocks stay for many works (work_tile.cuh). Of their warpgroups 0 ... kConsumers - 1
// compute, 64 rows each (consumer.cuh); of the last one, warp 0 copies (producer.cuh), warp 1 says
// which work is next (scheduler.cuh), and the others leave. For float8 warps 1 to 3 transpose what
// was copied of V (flash_fwd_fp8/transposer.cuh), and warp 3 says which work is next. All they
// share are the rings: a stage's contents and its two barriers.
#pragma once

#include "cuda/sm90/flash_fwd/consumer.cuh"
#include "cuda/sm90/flash_fwd/producer.cuh"
#include "cuda/sm90/flash_fwd/scheduler.cuh"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashFwdTransposer;

template <class Element, class Tiles>
struct FlashFwdKernel {
  using Params = FlashFwdKernelParams;
  using Storage = FlashFwdStorage<Element, Tiles>;
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(Storage));
  };
  static_assert(Config::kSharedBytes <= 227 * 1024, "what compute capability 9.0 has for a block");

  static SA_DEVICE void run(const Params& params, char* shared) {
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    if (primitives::thread_idx() == 0) {
      storage.init_rings();
      primitives::fence_mbarrier_init();
    }
    primitives::sync_threads();  // the barriers are there for all
    const int warpgroup = primitives::warpgroup_idx();
    const int warp = primitives::warp_idx();
    if (warpgroup == Tiles::kConsumers) {
      primitives::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
      if (warp % 4 == 0) {
        FlashFwdProducer<Element, Tiles>{params, storage}.run();
      } else if constexpr (Storage::kTransposesValues) {
        FlashFwdTransposer<Element, Tiles>{params, storage}.run();
      } else if (warp % 4 == 1) {
        FlashFwdScheduler<Element, Tiles>{params, storage}.run();
      }
    } else {
      primitives::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      FlashFwdConsumer<Element, Tiles>{params, storage, warpgroup, warp}.run();
    }
  }
};

}  // namespace sink_attention::cuda::sm90
