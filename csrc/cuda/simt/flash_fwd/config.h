// The float32 and float64 forward's tile sizes.
//
// A block's rows of q lie in shared memory, all columns of them; keys and values come 64 at a time
// in chunks of 256 bytes of columns. The number of rows follows from what q and a thread's part of
// the output may take: 32 KB of each, that is 64 registers a thread. With two chunks (34 KB) and
// the weights (17 KB at most) a block stays within the 99 KB that compute capability 8.6, 8.9 and
// 12.0 have.
#pragma once

namespace sink_attention::cuda::simt {

template <class Real_, int kHeadDim_>
struct FlashFwdTiles {
  using Real = Real_;
  static constexpr int kHeadDim = kHeadDim_;  // the larger of head_dim and head_dim_v fits
  static constexpr int kBlockN = 64;
  static constexpr int kMostRows = 256 / static_cast<int>(sizeof(Real));
  static constexpr int kFittingRows = 32 * 1024 / (kHeadDim * static_cast<int>(sizeof(Real)));
  static constexpr int kBlockM = kFittingRows < kMostRows ? kFittingRows : kMostRows;
};

}  // namespace sink_attention::cuda::simt
