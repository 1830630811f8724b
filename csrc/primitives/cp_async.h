// Asynchronous copies from global to shared memory (cp.async).
//
//   void cp_async_16(void* shared, const void* global, bool valid)
//        Starts a copy of 16 bytes; both addresses are aligned to 16. If !valid, it reads nothing
//        and writes zeros.
//   void cp_async_4(void* shared, const void* global, bool valid)
//        The same for 4 bytes.
//   void cp_async_commit()
//        Ends the group of the copies since the last commit.
//   void cp_async_wait<kPending>()
//        Waits until at most kPending of this thread's groups are incomplete. This thread may then
//        read the bytes; other threads may after a barrier.
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/cp_async.h"
#else
#include "primitives/ptx/cp_async.h"
#endif
