// Barriers of a block.
//
//   void sync_threads()                       all threads of the block; orders shared and global
//                                             memory among them
//   void sync_named(int id, int num_threads)  `num_threads` threads (whole warps) that name barrier
//                                             id, 1 .. 15; 0 is sync_threads' own
//   void arrive_named(int id, int num_threads)    the same arrival without the wait: these threads
//                                             are counted, and go on
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/cta.h"
#else
#include "primitives/ptx/cta.h"
#endif
