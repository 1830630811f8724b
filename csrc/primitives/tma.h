// Copies of boxes of a tensor of three to five dimensions by the copy engine (TMA, compute
// capability 9.0).
//
// On the host:
//   struct TensorMapShape
//        The tensor and the box; dimension 0 is the innermost.
//   TensorMap encode_tensor_map(const TensorMapShape&)
//        Throws std::runtime_error if the driver refuses it. A TensorMap is plain data; a kernel
//        gets it inside its Params.
//
// In a kernel:
//   void prefetch_tensor_map(const TensorMap*)
//   void tma_load<kRank>(void* shared, const TensorMap*, Mbarrier* barrier, const int (&at)[kRank])
//        One thread starts the copy of the box at element `at`. All bytes of the box complete on
//        the barrier. Elements outside the tensor become zeros. With a swizzle, `shared` is aligned
//        to 8 swizzled rows: 1024 bytes for 128-byte rows.
//
// A box is stored in shared memory row by row, dimension 0 innermost. A swizzle permutes the
// 16-byte chunks of its rows, which have the swizzle's width. Chunk c of row r is stored at chunk
//
//     k128   c ^ (r % 8)
//     k64    c ^ (r / 2 % 4)
//     k32    c ^ (r / 4 % 2)
//
// as in cuda/tile/smem_tile.cuh.
#pragma once

#include "primitives/mbarrier.h"

namespace sink_attention::primitives {

constexpr int kMaxTensorRank = 5;

enum class Swizzle : int { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

struct TensorMapShape {
  const void* base;              // aligned to 16 bytes
  int element_bytes;             // 1 or 2
  int rank;                      // 3, 4 or 5
  int64_t size[kMaxTensorRank];  // elements, at least 1
  // Multiples of 16 below 2^40; stride 0 is the element's size and not read.
  int64_t stride_bytes[kMaxTensorRank];
  int box[kMaxTensorRank];  // at most 256 each; box[0] elements are one row of the swizzle
  Swizzle swizzle;
};

struct alignas(128) TensorMap {
  uint64_t words[16];
};

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/tma.h"
#else
#include "primitives/ptx/tma.h"
#endif
