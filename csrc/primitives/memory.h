// Loads and stores. Kernels reach memory through these (and cp_async.h, ldmatrix.h, atomic.h) only,
// so that the emulator sees each access: bounds, alignment, unwritten bytes, races.
//
//   T load_global(const T*)   void store_global(T*, T)     T of 1, 2, 4, 8 or 16 bytes, aligned to
//   its T load_shared(const T*)   void store_shared(T*, T)     size; Bytes16 is the widest
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
