// The float32 and float64 backward's tile sizes.
//
// A CTA keeps kBlockM rows of two matrices in shared memory, all columns: Q and dO, or K and V. It
// visits blocks of 64 rows of the other two, which arrive in column chunks of 256 bytes.
//
// kBlockM: each of the two matrices may take 16 KB, so that a thread's part of two outputs is 64
// registers. In double, 32 rows would fit at head_dim 64, but a thread's part of the scores would
// then exceed 255 registers; so the limit is 16 rows.
//
// With two chunks (34 KB) and P (17 KB at most) a CTA stays below 99 KB, the limit on compute
// capability 8.6, 8.9 and 12.0.
#pragma once

namespace sink_attention::cuda::simt {

template <class Real_, int kHeadDim_>
struct FlashBwdTiles {
  using Real = Real_;
  static constexpr int kHeadDim = kHeadDim_;  // at least head_dim and head_dim_v
  static constexpr int kBlockN = 64;
  static constexpr int kMostRows = sizeof(Real) == 4 ? 64 : 16;
  static constexpr int kFittingRows = 16 * 1024 / (kHeadDim * static_cast<int>(sizeof(Real)));
  static constexpr int kBlockM = kFittingRows < kMostRows ? kFittingRows : kMostRows;
};

}  // namespace sink_attention::cuda::simt
