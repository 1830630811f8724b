// The forward's tile sizes.
//
// A block of kWarpsM x kWarpsN warps holds kBlockM rows of Q and walks over blocks of kBlockN keys.
// Warps along M own 16 * kTilesM rows each; warps along N share the same rows and divide each
// block's keys among them, each with a softmax of its own, merged once at the end.
//
// Prefill: 128 rows. With 32 rows a warp, an operand of K or V that ldmatrix brings feeds 4
// products instead of 2, which keeps shared memory's bandwidth ahead of the tensor cores. At
// head_dim 128 the output takes 128 registers; with 64 keys a block, whose scores take 64 more, the
// compiler spilled, so there are 32, which also leaves room for two thread blocks in 99 KB. From
// head_dim 192 on a warp holds 16 rows.
//
// Decode: one group of query heads rarely has more than 16 rows; all four warps share them, and two
// stages of keys are under way while one is used.
//
// A row's sums run over blocks of kBlockN keys counted from key 0, and within a block in an order
// that is the same for every row: with prefill tiles a row's bits do not depend on the tile that it
// is in. Decode tiles divide the sums among warps and so round otherwise; num_splits = 1, the
// batch-invariant mode, does without them (entry.h).
//
// Shared memory stays within 99 KB, what a block may have on compute capability 8.6, 8.9 and 12.0.
#pragma once

namespace sink_attention::cuda::sm80 {

template <int kHeadDim_, int kHeadDimV_, int kWarpsM_, int kWarpsN_, int kTilesM_, int kBlockN_,
          int kStages_>
struct FlashFwdTiles {
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K, zero-padded to it in shared memory
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and out
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kTilesM = kTilesM_;
  static constexpr int kBlockM = 16 * kTilesM * kWarpsM;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;  // of a block, a warp's
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static_assert(kWarpKeys % 16 == 0, "operand B comes in pairs of 8 columns");
};

template <int kHeadDim, int kHeadDimV>
struct Prefill : FlashFwdTiles<kHeadDim, kHeadDimV, 4, 1, 2, 64, 1> {};
template <>
struct Prefill<128, 128> : FlashFwdTiles<128, 128, 4, 1, 2, 32, 1> {};
template <>
struct Prefill<192, 192> : FlashFwdTiles<192, 192, 8, 1, 1, 64, 1> {};
template <>
struct Prefill<192, 128> : FlashFwdTiles<192, 128, 8, 1, 1, 64, 1> {};
template <>
struct Prefill<256, 256> : FlashFwdTiles<256, 256, 4, 1, 1, 64, 1> {};

template <int kHeadDim, int kHeadDimV>
struct Decode : FlashFwdTiles<kHeadDim, kHeadDimV, 1, 4, 1, 64, (kHeadDim <= 64 ? 4 : 2)> {};
template <>
struct Decode<192, 192> : FlashFwdTiles<192, 192, 1, 4, 1, 64, 1> {};
template <>
struct Decode<192, 128> : FlashFwdTiles<192, 128, 1, 4, 1, 64, 2> {};
template <>
struct Decode<256, 256> : FlashFwdTiles<256, 256, 1, 4, 1, 64, 1> {};

}  // namespace sink_attention::cuda::sm80
