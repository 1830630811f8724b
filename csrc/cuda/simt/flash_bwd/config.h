// The float32 and float64 backward's tile sizes.
//
// A block keeps kBlockM rows of two matrices in shared memory (Q and dO, or K and V), all columns
// of them, and walks over blocks of 64 rows of the two others, which come in chunks of 256 bytes of
// columns. The number of rows follows from what each of the two may take: 16 KB, so that a thread's
// part of two outputs is 64 registers. In double 32 rows would fit at head_dim 64, but not a
// thread's part of the scores into its 255 registers. With two chunks (34 KB) and the weights (17
// KB at most) a block stays within the 99 KB that compute capability 8.6, 8.9 and 12.0 have.
#pragma once

namespace sink_attention::cuda::simt {

template <class Real_, int kHeadDim_>
struct FlashBwdTiles {
  using Real = Real_;
  static constexpr int kHeadDim = kHeadDim_;  // the larger of head_dim and head_dim_v fits
  static constexpr int kBlockN = 64;
  static constexpr int kMostRows = sizeof(Real) == 4 ? 64 : 16;
  static constexpr int kFittingRows = 16 * 1024 / (kHeadDim * static_cast<int>(sizeof(Real)));
  static constexpr int kBlockM = kFittingRows < kMostRows ? kFittingRows : kMostRows;
};

}  // namespace sink_attention::cuda::simt
