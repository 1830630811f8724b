// Who a thread is, and the mark of a device function.
//
// Each contract header of this folder states what a primitive does; ptx/ holds the instruction and
// nothing else, host/ a function of the same signature for the emulator (tests/emulator), which
// runs the kernels' own source on a CPU. SA_EMULATE selects it.
//
//   int thread_idx()   index of the thread in its block, 0 .. block size - 1 (blocks are 1-D)
//   int lane_idx()     thread_idx() % 32
//   int rematerialise_thread_idx(), rematerialise_lane_idx()    the same; what is computed from them is computed
//                      where they are called, not kept in registers from an earlier place
//   int warp_idx()     thread_idx() / 32, the same register for all lanes of a warp, all of
//                      which call
//   Index3 block_idx(), grid_dim()
//   int optimisation_barrier(int x)  x, of which the compiler knows nothing: what is computed from it is computed
//                      there, and not kept in registers from before a loop
//   SA_UNROLL, SA_ROLLED before a loop: that it be unrolled, or that it stay one
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
