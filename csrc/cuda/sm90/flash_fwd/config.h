// The forward's tile sizes on Hopper.
//
// A thread block is one warpgroup that copies and kConsumers that compute, 64 rows of Q each; it
// walks over blocks of kBlockN keys. Registers, floats a thread of a computing warpgroup: the
// scores kBlockN / 2, the weights as operands kBlockN / 4, the output kHeadDimV / 2. Three
// computing warpgroups have 160 registers a thread, two have 232; the copying one has what is left.
//
// Shared memory, 2-byte numbers: kQueryStages times Q, kBlockM * kHeadDim, and kStages times K and
// V, kBlockN * (kHeadDim + kHeadDimV); one block may have 227 KB, and there is one on a
// multiprocessor. Under way while a block of keys is used: (kStages - 1) others, at head_dim 64
// 96 KB, at 128 128 KB. Where there is room for two Q, the next tile's is there when the last one's
// scores end; with one it is asked for then, its first keys before.
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
  // A thread; they are given and taken within what the block has at its start, the same number for
  // each thread. More would wait forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                    (kConsumers + 1) * kLaunchRegisters,
                "the registers of a block");
  // Warpgroups take turns at the tensor cores, so that one's softmax runs beside another's
  // products. From head_dim 192 on products take so long that turns are not worth their barriers.
  static constexpr bool kUseSchedulerBarrier = kHeadDim <= 128;
};

// clang-format off
//                                                        dims       warpgroups  keys  stages of K, Q
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
