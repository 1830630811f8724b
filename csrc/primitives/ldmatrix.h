// Loads 8 x 8 matrices of 16-bit elements from shared memory into a warp's registers.
//
//   void ldmatrix_x4(uint32_t (&r)[4], const void* row)
//        Lane l passes the address of row l % 8 of matrix l / 8: 16 bytes, aligned to 16. Its r[i]
//        receives elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1) of matrix i, the first
//        in the low half.
//   void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row)
//        The same of each matrix transposed: elements (2 * (l % 4), l / 4) and
//        (2 * (l % 4) + 1, l / 4).
#pragma once

#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/ldmatrix.h"
#else
#include "primitives/ptx/ldmatrix.h"
#endif
