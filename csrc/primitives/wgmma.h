// The tensor cores' product of a warpgroup (compute capability 9.0, sm_90a), which runs beside it:
// acc += A B, A of 64 x 16, B of 16 x kN with kN = 8 kTilesN, float32 sums. (float8: 32 deep, and
// of each term and sum, acc too, about 14 bits are kept, cut toward zero.)
//
//   uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes, Swizzle)
//        where an operand in shared memory lies. All but kMajorMn operands of several swizzle rows
//        lie in rows of the swizzle's width, 8 of them every `stride_bytes`:
//          Major::kK   rows are m (or n), columns k. leading_bytes is not used. The next 16 columns
//                      within the swizzle's width are 32 bytes further.
//          Major::kMn  rows are k, columns m (or n), 16-bit elements only. Columns beyond the
//                      swizzle's width continue leading_bytes further.
//        `start` may be anywhere in the swizzle's pattern that begins at a multiple of 8 rows.
//
//   template <class Element, Major kMajorA, Major kMajorB, int kTilesN>
//   void wgmma_ss(float (&acc)[kTilesN][4], uint64_t a, uint64_t b, bool accumulate)
//   template <class Element, Major kMajorB, int kTilesN>
//   void wgmma_rs(float (&acc)[kTilesN][4], const uint32_t (&a)[4], uint64_t b, bool accumulate)
//        BFloat16, Float16 or Float8E4M3 (kK only). Where !accumulate, acc is what A B is.
//
//   void warpgroup_arrive()             before the first product, and before one whose registers (acc,
//   or
//                                  a) other instructions have touched since the last fence
//   void wgmma_commit()            closes the group of the products started since the last commit
//   void wgmma_wait<kPending>()    until at most the kPending latest groups are under way. Before
//                                  that, nobody touches a group's acc, a, or shared operands; but
//                                  products on one acc follow each other without a wait.
//   void warpgroup_fence_operand(acc)           accesses to acc stay on the side of this call on which they are
//                                  written: to be called after the wait, and before the first
//                                  product
//
// All 128 threads of a warpgroup come to each call. Of warp w = 0 .. 3 in it, rows 16 w ... 16 w +
// 15 of A and acc: a lane holds of them what it would hold in mma_m16n8k16
// (cuda/tile/fragment.cuh), acc[n] being columns 8 n ... 8 n + 7.
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
