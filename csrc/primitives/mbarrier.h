// Barriers in shared memory that count arrivals of threads and bytes of copies (compute capability
// 9.0).
//
// A phase completes when `count` threads have arrived and all expected bytes have been copied; the
// next phase begins at once. Phases have parities 0, 1, 0, ... A wait names the parity of the phase
// that it waits for. So a thread's n-th wait (from 0) passes n % 2, and a wait with parity 1 on a
// new barrier returns at once.
//
//   struct Mbarrier
//        8 bytes in shared memory, accessed by these functions only.
//   void mbarrier_init(Mbarrier*, int count)
//        One thread. It then calls fence_mbarrier_init, and then a barrier of the block.
//   void fence_mbarrier_init()
//   void mbarrier_arrive(Mbarrier*)
//        One arrival. Orders what this thread did before what the waiting threads do after.
//   void mbarrier_arrive_expect_tx(Mbarrier*, int bytes)
//        One arrival; the phase also expects `bytes` more bytes.
//   void mbarrier_wait(Mbarrier*, int parity)
//        Waits until the phase has completed. Its bytes, and what came before its arrivals, are
//        then visible.
#pragma once

#include "primitives/simt.h"

namespace sink_attention::primitives {

struct alignas(8) Mbarrier {
  uint64_t state;
};

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/mbarrier.h"
#else
#include "primitives/ptx/mbarrier.h"
#endif
