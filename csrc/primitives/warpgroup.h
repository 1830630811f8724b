// Four warps that work as one (compute capability 9.0, sm_90a): threads 128 w ... 128 w + 127.
//
//   int warpgroup_idx()          thread_idx() / 128, the same register for all lanes of a warp; all
//                                of them call
//   void warpgroup_reg_dealloc<kCount>()    this warpgroup keeps kCount registers a thread
//   void warpgroup_reg_alloc<kCount>()    and this one has kCount from now on, once there are so many
//        Every warp of the warpgroup calls, at most once; kCount is a multiple of 8, 24 to 256. The
//        block's warpgroups together must not have more than the block got at its launch, which is
//        the same number for each thread, 65536 / threads rounded down to a multiple of 8.
#pragma once

#include "primitives/simt.h"

namespace sink_attention::primitives {

constexpr int kWarpgroupSize = 128;

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/warpgroup.h"
#else
#include "primitives/ptx/warpgroup.h"
#endif
