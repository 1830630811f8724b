// The tensor core product of a warp: acc += A B, A of 16 x 16, B of 16 x 8, float32 sums.
//
//   template <class Element>  BFloat16 or Float16
//   void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
//
// cuda/tile/fragment.cuh says which lane holds which element.
#pragma once

#include "attention/numeric.h"
#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/mma.h"
#else
#include "primitives/ptx/mma.h"
#endif
