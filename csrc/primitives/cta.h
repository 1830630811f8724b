// Barriers of a thread block.
//
//   void sync_threads()
//        All threads of the block. Orders shared and global memory among them.
//   void sync_named(int id, int num_threads)
//        Barrier id (1 .. 15) for `num_threads` threads, whole warps. 0 is sync_threads' own.
//   void arrive_named(int id, int num_threads)
//        Arrives at barrier id without waiting; `num_threads` includes these threads.
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/cta.h"
#else
#include "primitives/ptx/cta.h"
#endif
