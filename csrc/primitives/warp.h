// Operations among the 32 lanes of a warp. Every lane calls, at the same place.
//
//   T shfl(T value, int lane)         the value of another lane (T: float, int, uint32_t)
//   T shfl_xor(T value, int mask)     the value of lane (own ^ mask)
//   bool any(bool value)              whether any lane's value is true
//   int first_lane(bool value)        the lowest lane whose value is true; kWarpSize without one
//   void sync_warp()                  orders shared memory among the lanes
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/warp.h"
#else
#include "primitives/ptx/warp.h"
#endif
