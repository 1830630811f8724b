// Copies by the copy engine (compute capability 9.0): one thread starts them, they run beside all
// threads. They, and wgmma, reach shared memory through the async proxy, other instructions through
// the generic one.
//
//   void fence_proxy_async()     this thread's earlier stores to shared memory (cp.async that it
//   has
//                                waited for too) come before what copies and wgmma do after the
//                                next barrier: each writing thread calls it before that barrier
//   void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier)
//        starts a copy and announces its bytes to the barrier as they arrive; both addresses and
//        bytes are multiples of 16
//   void bulk_reduce_add(float* global, const float* shared, int bytes)
//        starts to add floats of shared memory to floats of global memory; 16-byte multiples too
//   void bulk_commit()           closes the group of the bulk_reduce_adds since the last commit
//   void bulk_wait_read<kPending>()    until at most the kPending latest groups of this thread are
//                                yet to be read from shared memory
//   void bulk_wait<kPending>()   ... are yet to be done
#pragma once

#include "primitives/mbarrier.h"

#if defined(SA_EMULATE)
#include "primitives/host/bulk.h"
#else
#include "primitives/ptx/bulk.h"
#endif
