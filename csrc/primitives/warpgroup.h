// Warpgroups: four warps that work as one, threads 128 w ... 128 w + 127 (compute capability 9.0,
// sm_90a).
//
//   int warpgroup_idx()
//        thread_idx() / 128, uniform in a warp; all lanes of the warp call.
//   void warpgroup_reg_dealloc<kCount>()
//        Reduces this warpgroup's registers to kCount a thread (setmaxnreg.dec).
//   void warpgroup_reg_alloc<kCount>()
//        Raises them to kCount a thread (setmaxnreg.inc); waits until so many are free.
//
// Every warp of the warpgroup calls one of the two, at most once. kCount is a multiple of 8, 24 to
// 256. The block's warpgroups together must not exceed the registers of the launch: for each thread
// 65536 / threads, rounded down to a multiple of 8.
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
