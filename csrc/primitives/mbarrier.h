// Barriers in shared memory that count threads and bytes of copies (compute capability 9.0).
//
// A phase ends when `count` arrivals have come and every byte that was expected in it has been
// copied; the next one begins at once. Phases have parities 0, 1, 0, ...: a wait names the parity
// of the phase whose end it waits for, so a thread that waits for its n-th phase passes n % 2, and
// a wait with parity 1 on a new barrier returns at once.
//
//   struct Mbarrier                             8 bytes in shared memory; touched by these only
//   void mbarrier_init(Mbarrier*, int count)    by one thread, which then calls
//   void fence_mbarrier_init()                  before a barrier of the block lets others use it
//   void mbarrier_arrive(Mbarrier*)             one arrival; what the thread did before comes
//   before
//                                               what waiting threads do after
//   void mbarrier_arrive_expect_tx(Mbarrier*, int bytes)    the same, and `bytes` more are expected
//   void mbarrier_wait(Mbarrier*, int parity)   until that phase has ended; what came before its
//                                               arrivals and the copies' bytes are there to read
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
