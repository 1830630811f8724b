// Loads and stores. Kernels access memory only through these and cp_async.h, ldmatrix.h, atomic.h,
// bulk.h and tma.h, so that the emulator checks each access: bounds, alignment, unwritten bytes,
// races.
//
//   T load_global(const T*)      void store_global(T*, T)
//   T load_shared(const T*)      void store_shared(T*, T)
//
// T has 1, 2, 4, 8 or 16 bytes and is aligned to its size. Bytes16 is the widest.
#pragma once

#include "primitives/simt.h"

namespace sink_attention::primitives {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Float2 {
  float x;
  float y;
};
struct alignas(16) Float4 {
  float x;
  float y;
  float z;
  float w;
};

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/memory.h"
#else
#include "primitives/ptx/memory.h"
#endif
