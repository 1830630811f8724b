// The backward's tile sizes on Hopper.
//
// Two consumer warpgroups share a block of kBlockN keys and iterate over tiles of kBlockM PackGQA
// rows of queries. A third warpgroup loads Q and dO, and adds dQ.
//
//   kColumnParts = 1   Each consumer owns 64 keys: their scores with all rows of the tile, their dK
//                      and dV. P^T and dS^T are operands of dV += P^T dO and dK += dS^T Q as they
//                      lie in registers. Only dS goes through shared memory, for dQ, whose sum runs
//                      over all keys of the block.
//   kColumnParts = 2   From head_dim 192 on, dK and dV of 64 keys do not fit into one warpgroup's
//                      registers. Both consumers share 64 keys. Each has the scores with half of
//                      the rows, and half of dK's and dV's columns. P goes through shared memory
//                      too.
//
// Accumulators, floats a thread, of at most kConsumerRegisters:
//     dK and dV              (kHeadDim + kHeadDimV) / 2 / kColumnParts
//     S and dP               kBlockM / kColumnParts
//     P and dS as operands   half of that
//     dQ                     kBlockM * kHeadDim / 256, when S and P are no longer needed
//
// Shared memory: K and V once; Q and dO in rings; dS twice, or P twice; dQ once, in float32.
#pragma once

namespace sink_attention::cuda::sm90 {

template <int kHeadDim_, int kHeadDimV_, int kColumnParts_, int kBlockM_, int kStages_>
struct FlashBwdTiles {
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K, zero-padded to it in shared memory
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and dO
  static constexpr int kColumnParts = kColumnParts_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kStages = kStages_;  // of Q and of dO, in flight or in use

  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = 128 + kConsumerThreads;
  // Three warpgroups start with 168 registers a thread: 65536 of an SM, rounded down.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static constexpr int kKeyParts = kConsumers / kColumnParts;
  static constexpr int kBlockN = 64 * kKeyParts;
  static constexpr int kConsumerRows =
      kBlockM / kColumnParts;  // rows of a tile in a consumer's scores
  static constexpr int kConsumerCols = kHeadDim / kColumnParts;
  static constexpr int kConsumerColsV = kHeadDimV / kColumnParts;
  static constexpr bool kSharesKeys = kColumnParts > 1;
  // Slab width of a tile of `cols` columns: each consumer's part consists of whole slabs.
  static constexpr int slab_cols(int cols) { return cols / kColumnParts % 64 == 0 ? 64 : 32; }

  // dQ is kBlockM x kHeadDim. A consumer has 64 rows of it, or half of the columns, in whole slabs.
  static constexpr bool kDividesDqRows = kBlockM == 128;
  static constexpr int kDqCols0 = kDividesDqRows ? kHeadDim
                                                 : (kHeadDim / 2 + slab_cols(kHeadDim) - 1) /
                                                       slab_cols(kHeadDim) * slab_cols(kHeadDim);
  static constexpr int kDqCols1 = kDividesDqRows ? kHeadDim : kHeadDim - kDqCols0;

  static_assert(kBlockM == 64 || kBlockM == 128, "a wgmma has 64 rows of dQ");
};

// clang-format off
// FlashBwdTiles<head_dim, head_dim_v, column parts, rows a tile, stages>
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
