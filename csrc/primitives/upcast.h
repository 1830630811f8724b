// Four 8-bit numbers of a register: made Float16 ones, which hold all of them exactly (NaN stays
// NaN; compute capability 8.9 and later), or put in another order.
//
//   template <class Stored>  Float8E4M3 or Int8
//   void upcast(uint32_t four, uint32_t& low, uint32_t& high)    bytes 0 and 1, bytes 2 and 3
//   uint32_t swap_middle_bytes(uint32_t four)                   bytes 0, 2, 1, 3
//   uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which)
//        of the bytes 0 ... 3 of low and 4 ... 7 of high those that which's four lowest hexadecimal
//        digits name, the last digit byte 0
#pragma once

#include "attention/numeric.h"
#include "primitives/simt.h"

#if defined(SA_EMULATE)
#include "primitives/host/upcast.h"
#else
#include "primitives/ptx/upcast.h"
#endif
