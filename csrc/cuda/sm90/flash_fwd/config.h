// The forward's tile sizes on Hopper.
//
// A thread block (CTA) is one producer warpgroup and kConsumers consumer warpgroups, 64 rows of Q
// each. It iterates over blocks of kBlockN keys.
//
// Registers, floats a thread of a consumer warpgroup:
//     scores S                kBlockN / 2
//     P as operand A          kBlockN / 4
//     output O                kHeadDimV / 2
// With three consumer warpgroups a thread has 160 registers, with two it has 232. The producer has
// what is left.
//
// Shared memory, in 2-byte elements; a CTA may have 227 KB, and an SM has one CTA:
//     Q          kQueryStages * kBlockM * kHeadDim
//     K and V    kStages * kBlockN * (kHeadDim + kHeadDimV)
// Bytes in flight while a block of keys is used: (kStages - 1) other blocks, which are 96 KB at
// head_dim 64 and 128 KB at 128. With two stages of Q, the next tile's Q is loaded before the last
// scores of this tile end. With one, it is requested then; the next tile's first keys come before.
#pragma once

namespace sink_attention::cuda::sm90 {

template <int kHeadDim_, int kHeadDimV_, int kConsumers_, int kBlockN_, int kStages_,
          int kQueryStages_>
struct FlashFwdTiles {
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K, zero-padded to it in shared memory
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and out
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  static constexpr int kQueryStages = kQueryStages_;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers a thread. setmaxnreg moves registers within what the CTA has at launch, where each
  // thread has the same number. An increase beyond that would wait forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                    (kConsumers + 1) * kLaunchRegisters,
                "no more registers than the CTA has at launch");
  // The warp-scheduler barrier orders the warpgroups' products, so that one warpgroup's softmax
  // overlaps another's products. From head_dim 192 on products take so long that it does not pay.
  static constexpr bool kUseSchedulerBarrier = kHeadDim <= 128;
};

// clang-format off
// FlashFwdTiles<head_dim, head_dim_v, consumers, keys a block, stages of K and V, stages of Q>
template <int kHeadDim, int kHeadDimV>
struct FlashFwdTilesOf;
template <> struct FlashFwdTilesOf<64, 64>   : FlashFwdTiles< 64,  64,     3,     128,   4, 2> {};
template <> struct FlashFwdTilesOf<96, 96>   : FlashFwdTiles< 96,  96,     3,      96,   4, 2> {};
template <> struct FlashFwdTilesOf<128, 128> : FlashFwdTiles<128, 128,     2,     128,   3, 1> {};
template <> struct FlashFwdTilesOf<192, 128> : FlashFwdTiles<192, 128,     2,     128,   2, 1> {};
template <> struct FlashFwdTilesOf<192, 192> : FlashFwdTiles<192, 192,     2,      96,   2, 1> {};
template <> struct FlashFwdTilesOf<256, 256> : FlashFwdTiles<256, 256,     2,      80,   2, 1> {};
// clang-format on

}  // namespace sink_attention::cuda::sm90
