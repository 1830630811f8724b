// Operations on global memory that other blocks take part in.
//
//   void atomic_add(float* sum, float value)
//
//   void semaphore_wait(const int* semaphore, int value)
//        One thread waits until *semaphore == value. It then sees what other blocks wrote before
//        they released the semaphore.
//   void semaphore_release(int* semaphore, int value)
//        One thread publishes all that it has seen and written, then *semaphore = value.
//   void fence_proxy_async_global()
//        After semaphore_wait: orders it before this thread's bulk_reduce_add (bulk.h).
//
// A block waits only for blocks that start earlier (a lower linear block index).
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/atomic.h"
#else
#include "primitives/ptx/atomic.h"
#endif
