// The forward on Hopper: consumer warpgroups that compute, fed by a producer warpgroup.
//
// CTAs are persistent (work_tile.cuh). Warp roles:
//
//     warpgroups 0 ... kConsumers - 1    consumers, 64 rows of Q each (consumer.cuh)
//     last warpgroup, warp 0             producer: loads Q, K and V (producer.cuh)
//     last warpgroup, warp 1             scheduler: writes work tiles ahead (scheduler.cuh)
//     last warpgroup, warps 2 and 3      exit
//     float8: last warpgroup, warps 1-3  transpose V (flash_fwd_fp8/transposer.cuh); warp 3 is also
//                                        the scheduler
//
// They share only the rings: a stage's contents and its two barriers.
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
  static_assert(Config::kSharedBytes <= 227 * 1024,
                "shared memory of a CTA on compute capability 9.0");

  static SA_DEVICE void run(const Params& params, char* shared) {
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    if (primitives::thread_idx() == 0) {
      storage.init_rings();
      primitives::fence_mbarrier_init();
    }
    primitives::sync_threads();  // the barriers are initialised
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
