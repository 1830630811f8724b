// Operations on global memory that other blocks take part in.
//
//   void atomic_add(float* sum, float value)
//   void semaphore_wait(const int* turn, int mine)
//        one thread: until *turn == mine; what blocks wrote before they passed the turn on is then
//        visible to this thread
//   void fence_turn_for_copies()
//        and, after this, comes before what bulk_reduce_add (bulk.h) does for it
//   void semaphore_release(int* turn, int next)
//        one thread: makes what it has seen and written visible, then *turn = next
// A turn is only ever waited for from blocks that start earlier (a lower linear block index).
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/atomic.h"
#else
#include "primitives/ptx/atomic.h"
#endif
