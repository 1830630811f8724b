// The forward's tile sizes.
//
// A CTA of kWarpsM x kWarpsN warps has kBlockM rows of Q and visits blocks of kBlockN keys. A warp
// along M has 16 * kTilesM rows. Warps along N share these rows and divide the keys of each block.
// Each of them has its own softmax, and their results are merged once, at the end.
//
// Prefill: 128 rows, or 64 at head_dim 256.
//   - Up to head_dim 128 a warp has 32 rows. Each ldmatrix of K or V then feeds 4 products instead
//     of 2, so that shared memory's bandwidth does not limit the tensor cores.
//   - At head_dim 128 O takes 128 registers. With 64 keys a block, S takes 64 more, and the
//     compiler spilled. So a block has 32 keys. That also lets two CTAs share an SM.
//   - From head_dim 192 on a warp has 16 rows.
//
// Decode: a kv head rarely has more than 16 rows. All four warps share them.
//
// Same bits: a row's sums run over blocks of kBlockN keys, counted from key 0, in an order that is
// the same for every row. So with prefill tiles a row's bits do not depend on its tile. Decode
// tiles divide the sums among warps, and so round differently. num_splits = 1, the batch-invariant
// mode, never uses them (flash_fwd.cu).
//
// Shared memory is at most 99 KB, the limit of a CTA on compute capability 8.6, 8.9 and 12.0.
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
  static constexpr int kWarpKeys = kBlockN / kWarpsN;  // keys of a block per warp
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static_assert(kWarpKeys % 16 == 0, "ldmatrix.x4 loads two operands B, 16 keys");
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
