// The backward's tile sizes.
//
// A block of kKeyWarps x kColumnWarps warps holds kBlockN keys and walks over tiles of kBlockM
// packed rows of queries. A warp owns 16 * kKeyTiles keys: their scores, dK and dV.
//
//   kColumnWarps = 1   a warp has the scores of its keys with all rows of the tile. P^T and dS^T
//                      then are operands of dV += P^T dO and dK += dS^T Q as they lie in its
//                      registers; only dS passes through shared memory, for dQ, whose sum runs over
//                      all keys of the block.
//   kColumnWarps = 2   from head_dim 192 on dK and dV of 16 keys do not fit into one warp's
//                      registers. Two warps share the keys: each has the scores with half of the
//                      rows, and half of dK's and dV's columns. P passes through shared memory too.
//
// Accumulators, floats a thread: dK and dV  kKeyTiles * (kHeadDim + kHeadDimV) / 2 / kColumnWarps;
// S and dP  kKeyTiles * kBlockM / kColumnWarps; V as an operand (kValuesInRegisters)
// kKeyTiles * kHeadDimV / 4. What is chosen below leaves some 40 of 255 registers for the rest.
//
// Shared memory, 2-byte numbers: K  kBlockN * kHeadDim, the same of V unless it is in registers,
// for each of kStages  kBlockM * (kHeadDim + kHeadDimV)  of Q and dO and  kBlockN * kBlockM  of dS,
// P once. All stay within 99 KB, what a block may have on compute capability 8.6, 8.9 and 12.0.
#pragma once

namespace sink_attention::cuda::sm80 {

template <int kHeadDim_, int kHeadDimV_, int kKeyWarps_, int kColumnWarps_, int kKeyTiles_,
          int kBlockM_, int kStages_, bool kValuesInRegisters_, int kRowWarps_, int kMinBlocks_>
struct FlashBwdTiles {
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K, zero-padded to it in shared memory
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and dO
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kKeyTiles = kKeyTiles_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kStages = kStages_;  // of Q and dO under way or in use
  static constexpr bool kValuesInRegisters = kValuesInRegisters_;
  static constexpr int kMinBlocks = kMinBlocks_;  // that share a multiprocessor's registers

  static constexpr int kWarps = kKeyWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockN = 16 * kKeyTiles * kKeyWarps;
  static constexpr int kWarpRows = kBlockM / kColumnWarps;  // of a tile, in a warp's scores
  static constexpr int kWarpCols = kHeadDim / kColumnWarps;
  static constexpr int kWarpColsV = kHeadDimV / kColumnWarps;
  // dQ, kBlockM x kHeadDim, by another division: kRowWarps along the rows, the others along the
  // columns.
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kDqRows = kBlockM / kRowWarps;
  static constexpr int kDqCols = kHeadDim / (kWarps / kRowWarps);

  static_assert(kStages == 1 || kStages == 2, "stages alternate");
  static_assert(kBlockM % 32 == 0, "a row of the tile of dS is a slab");
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kWarpColsV % 16 == 0,
                "operands B come in pairs of 8 columns");
  static_assert(kDqRows % 16 == 0 && kDqCols % 16 == 0 && kWarps % kRowWarps == 0,
                "whole products for each warp");
};

// clang-format off
//                                              warps:          rows     V in    row    blocks
//                                 dims   keys columns tiles  a tile stages regs  warps  an SM
template <int kHeadDim, int kHeadDimV>
struct FlashBwdTilesOf;
// 32 keys a warp: each operand of Q and dO that ldmatrix brings feeds 4 products instead of 2.
// Blocks are small enough that two share a multiprocessor, and one multiplies while the other
// waits at a barrier.
template <> struct FlashBwdTilesOf<32, 32>   : FlashBwdTiles<32, 32,    4, 1, 2,  64, 2, false, 4, 2> {};
template <> struct FlashBwdTilesOf<64, 64>   : FlashBwdTiles<64, 64,    4, 1, 2,  32, 2, false, 1, 2> {};
// 16 keys a warp. dK, dV: 96 floats; two blocks of 6 warps share the registers.
template <> struct FlashBwdTilesOf<96, 96>   : FlashBwdTiles<96, 96,    6, 1, 1,  32, 2, false, 1, 2> {};
// dK, dV: 128 floats. V in registers makes room for the second stage.
template <> struct FlashBwdTilesOf<128, 128> : FlashBwdTiles<128, 128,  8, 1, 1,  32, 2, true,  1, 1> {};
template <> struct FlashBwdTilesOf<192, 128> : FlashBwdTiles<192, 128,  4, 2, 1,  32, 2, true,  2, 1> {};
template <> struct FlashBwdTilesOf<192, 192> : FlashBwdTiles<192, 192,  4, 2, 1,  32, 2, true,  2, 1> {};
// One stage: K alone takes 32 KB, as two of Q and dO would.
template <> struct FlashBwdTilesOf<256, 256> : FlashBwdTiles<256, 256,  4, 2, 1,  32, 1, true,  1, 1> {};
// clang-format on

}  // namespace sink_attention::cuda::sm80
