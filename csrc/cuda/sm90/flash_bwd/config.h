// The backward's tile sizes on Hopper.
//
// Two warpgroups of consumers share a block of kBlockN keys and walk over tiles of kBlockM packed
// rows of queries; a third warpgroup loads Q and dO and adds dQ.
//
//   kColumnGroups = 1   each consumer owns 64 keys: their scores with all rows of the tile, dK and
//                       dV. P^T and dS^T are operands of dV += P^T dO and dK += dS^T Q as they lie
//                       in registers; only dS goes through shared memory, for dQ, whose sum runs
//                       over all keys of the block.
//   kColumnGroups = 2   from head_dim 192 on dK and dV of 64 keys do not fit into one warpgroup's
//                       registers. Both share 64 keys: each has the scores with half of the rows,
//                       and half of dK's and dV's columns. P goes through shared memory too.
//
// Accumulators, floats a thread of at most kConsumerRegisters: dK and dV
// (kHeadDim + kHeadDimV) / 2 / kColumnGroups;  S and dP  kBlockM / kColumnGroups;  P and dS as
// operands half of that;  dQ  kBlockM * kHeadDim / 256, at a time when S and P are gone.
//
// Shared memory: K and V once; Q and dO in rings; dS twice, or P twice; dQ once, in float32.
#pragma once

namespace sink_attention::cuda::sm90 {

template <int kHeadDim_, int kHeadDimV_, int kColumnGroups_, int kBlockM_, int kStages_>
struct FlashBwdTiles {
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K, zero-padded to it in shared memory
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and dO
  static constexpr int kColumnGroups = kColumnGroups_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kStages = kStages_;  // of Q and of dO under way or in use

  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = 128 + kConsumerThreads;
  // Of 65536: what three warpgroups start with is rounded down to 168 a thread.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static constexpr int kKeyGroups = kConsumers / kColumnGroups;
  static constexpr int kBlockN = 64 * kKeyGroups;
  static constexpr int kGroupRows = kBlockM / kColumnGroups;  // of a tile, in a consumer's scores
  static constexpr int kGroupCols = kHeadDim / kColumnGroups;
  static constexpr int kGroupColsV = kHeadDimV / kColumnGroups;
  static constexpr bool kSharesKeys = kColumnGroups > 1;
  // Slabs of a tile of so many columns: each consumer's part is made of whole ones.
  static constexpr int slab_cols(int cols) { return cols / kColumnGroups % 64 == 0 ? 64 : 32; }

  // dQ, kBlockM x kHeadDim: 64 rows for each consumer, or half of the columns, in whole slabs.
  static constexpr bool kDividesDqRows = kBlockM == 128;
  static constexpr int kDqCols0 = kDividesDqRows ? kHeadDim
                                                 : (kHeadDim / 2 + slab_cols(kHeadDim) - 1) /
                                                       slab_cols(kHeadDim) * slab_cols(kHeadDim);
  static constexpr int kDqCols1 = kDividesDqRows ? kHeadDim : kHeadDim - kDqCols0;

  static_assert(kBlockM == 64 || kBlockM == 128, "dQ's rows are those of one or two products");
};

// clang-format off
//                                           column  rows
//                                 dims      groups  a tile stages
template <int kHeadDim, int kHeadDimV>
struct FlashBwdTilesOf;
template <> struct FlashBwdTilesOf<64, 64>   : FlashBwdTiles<64, 64,    1, 128, 2> {};
template <> struct FlashBwdTilesOf<96, 96>   : FlashBwdTiles<96, 96,    1,  64, 2> {};
template <> struct FlashBwdTilesOf<128, 128> : FlashBwdTiles<128, 128,  1,  64, 2> {};
template <> struct FlashBwdTilesOf<192, 128> : FlashBwdTiles<192, 128,  2,  64, 2> {};
template <> struct FlashBwdTilesOf<192, 192> : FlashBwdTiles<192, 192,  2,  64, 2> {};
// One stage: K, V, Q and dO take 32 KB each, dQ 64 KB.
template <> struct FlashBwdTilesOf<256, 256> : FlashBwdTiles<256, 256,  2,  64, 1> {};
// clang-format on

}  // namespace sink_attention::cuda::sm90
