// Thread and block indices, and the decoration of a device function.
//
// Each header of this folder is the contract of some primitives. ptx/ implements them by an
// instruction and nothing else. host/ is their emulation: a function of the same signature for
// tests/emulator, which runs the kernels' own source on a CPU. SA_EMULATE selects it.
//
//   int thread_idx()          index of the thread in its block (blocks are 1-D)
//   int lane_idx()            thread_idx() % 32
//   int warp_idx()            thread_idx() / 32, uniform in a warp; all lanes of the warp call
//   Index3 block_idx(), grid_dim()
//
//   int rematerialise_thread_idx(), rematerialise_lane_idx()
//        thread_idx() and lane_idx(). Values computed from them are recomputed at the call, not
//        kept in registers from earlier code.
//   int optimisation_barrier(int x)
//        x, opaque to the compiler. Values computed from it are not hoisted above the call.
//
//   SA_UNROLL, SA_ROLLED      before a loop: unroll it; do not unroll it
#pragma once

#include <cstdint>

namespace sink_attention::primitives {

constexpr int kWarpSize = 32;

struct Index3 {
  int x;
  int y;
  int z;
};

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/simt.h"
#else
#include "primitives/ptx/simt.h"
#endif
