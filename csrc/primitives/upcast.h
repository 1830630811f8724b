// Upcasts of four 8-bit elements in a register to Float16, and permutations of a register's bytes.
//
//   template <class Stored>  Float8E4M3 or Int8
//   void upcast(uint32_t four, uint32_t& low, uint32_t& high)
//        Bytes 0 and 1 to low, bytes 2 and 3 to high, as Float16. Exact; NaN stays NaN. Compute
//        capability 8.9 and later.
//   uint32_t swap_middle_bytes(uint32_t four)
//        Bytes 0, 2, 1, 3.
//   uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which)
//        PTX's prmt: low holds bytes 0 ... 3, high bytes 4 ... 7. Hexadecimal digit i of `which`
//        (from the right, i < 4) selects byte i of the result.
#pragma once

#include "attention/numeric.h"
#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/upcast.h"
#else
#include "primitives/ptx/upcast.h"
#endif
