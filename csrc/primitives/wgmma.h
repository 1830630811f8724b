// The tensor core product of a warpgroup, which runs asynchronously (compute capability 9.0,
// sm_90a): acc += A B, A of 64 x 16, B of 16 x kN with kN = 8 kTilesN, float32 sums. float8: 32
// deep; each term and sum (acc, too) keeps about 14 bits, cut toward zero.
//
//   uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes, Swizzle)
//        The layout of an operand in shared memory: rows of the swizzle's width, 8 rows every
//        stride_bytes. `start` may be anywhere in a swizzle pattern, which begins at a multiple of
//        8 rows.
//          Major::kK    Rows are m (or n), columns are k. leading_bytes is unused. The next 16
//                       columns within the swizzle's width are 32 bytes further.
//          Major::kMn   Rows are k, columns are m (or n); 16-bit elements only. The columns beyond
//                       the swizzle's width are leading_bytes further.
//
//   template <class Element, Major kMajorA, Major kMajorB, int kTilesN>
//   void wgmma_ss(float (&acc)[kTilesN][4], uint64_t a, uint64_t b, bool accumulate)
//   template <class Element, Major kMajorB, int kTilesN>
//   void wgmma_rs(float (&acc)[kTilesN][4], const uint32_t (&a)[4], uint64_t b, bool accumulate)
//        Element is BFloat16, Float16 or Float8E4M3 (kK only). If !accumulate, acc = A B.
//
//   void warpgroup_arrive()
//        wgmma.fence. Before the first product, and before a product whose registers (acc or a)
//        other instructions have accessed since the last call.
//   void wgmma_commit()
//        Ends the group of the products since the last commit.
//   void wgmma_wait<kPending>()
//        Waits until at most kPending groups are incomplete. Until then nobody accesses a group's
//        acc, a, or shared operands. Products on the same acc need no wait between them.
//   void warpgroup_fence_operand(float (&acc)[kTilesN][4])
//        Keeps the compiler from moving accesses to acc across this call. Called before the first
//        product and after the wait.
//
// All 128 threads of a warpgroup call each function. Warp w = 0 .. 3 holds rows 16 w ... 16 w + 15
// of A and acc. A lane holds what it would hold in mma_m16n8k16 (cuda/tile/fragment.cuh); acc[n] is
// columns 8 n ... 8 n + 7.
#pragma once

#include "attention/numeric.h"
#include "primitives/tma.h"
#include "primitives/warpgroup.h"

namespace sink_attention::primitives {

enum class Major { kK, kMn };

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/wgmma.h"
#else
#include "primitives/ptx/wgmma.h"
#endif
