// Copies from global to shared memory that run beside the thread.
//
//   void cp_async_16(void* shared, const void* global, bool valid)
//        starts a copy of 16 bytes, both addresses aligned to 16; where !valid it reads nothing and
//        writes zeros
//   void cp_async_4(...)           the same of 4 bytes
//   void cp_async_commit()         closes the group of the copies started since the last commit
//   void cp_async_wait<kPending>() waits until at most the kPending latest groups of this thread
//   are
//        under way. What arrived is this thread's to read; other threads read it after a barrier.
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/cp_async.h"
#else
#include "primitives/ptx/cp_async.h"
#endif
