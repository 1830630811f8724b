// Approximate functions of one instruction.
//
//   float exp2_approx(float x)          2^x to about 2 ulp; -inf gives 0; subnormal results are 0
//   float reciprocal_approx(float x)    1 / x to 1 ulp
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/fast_math.h"
#else
#include "primitives/ptx/fast_math.h"
#endif
