// Bulk copies by the copy engine (compute capability 9.0): one thread starts them, and they run
// asynchronously.
//
// Bulk copies and wgmma access shared memory through the async proxy, all other instructions
// through the generic proxy.
//
//   void fence_proxy_async()
//        Orders this thread's earlier stores to shared memory, and its completed cp.async, before
//        the copies and wgmma that follow the next barrier. Each writing thread calls it before
//        that barrier.
//   void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier)
//        Starts a copy, whose bytes complete on the barrier. Addresses and bytes are multiples of
//        16.
//   void bulk_reduce_add(float* global, const float* shared, int bytes)
//        Starts to add floats of shared memory to global memory. Multiples of 16, too.
//   void bulk_commit()
//        Ends the group of the bulk_reduce_adds since the last commit.
//   void bulk_wait_read<kPending>()
//        Waits until at most kPending of this thread's groups still read shared memory.
//   void bulk_wait<kPending>()
//        Waits until at most kPending of this thread's groups are incomplete.
#pragma once

#include "primitives/mbarrier.h"

#if defined(SA_EMULATE)
#include "primitives/host/bulk.h"
#else
#include "primitives/ptx/bulk.h"
#endif
