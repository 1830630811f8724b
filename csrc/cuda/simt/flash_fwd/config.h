// The float32 and float64 forward's tile sizes.
//
// A CTA keeps kBlockM rows of q in shared memory, all columns. Keys and values arrive 64 at a time,
// in column chunks of 256 bytes.
//
// kBlockM: q may take 32 KB, and so may the output, which is 64 registers a thread. With two chunks
// (34 KB) and P (17 KB at most) a CTA stays below 99 KB, the limit on compute capability 8.6, 8.9
// and 12.0.
#pragma once

namespace sink_attention::cuda::simt {

template <class Real_, int kHeadDim_>
struct FlashFwdTiles {
  using Real = Real_;
  static constexpr int kHeadDim = kHeadDim_;  // at least head_dim and head_dim_v
  static constexpr int kBlockN = 64;
  static constexpr int kMostRows = 256 / static_cast<int>(sizeof(Real));
  static constexpr int kFittingRows = 32 * 1024 / (kHeadDim * static_cast<int>(sizeof(Real)));
  static constexpr int kBlockM = kFittingRows < kMostRows ? kFittingRows : kMostRows;
};

}  // namespace sink_attention::cuda::simt
