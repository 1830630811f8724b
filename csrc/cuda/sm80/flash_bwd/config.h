// The backward's tile sizes.
//
// A CTA of kKeyWarps x kColumnWarps warps has a block of kBlockN keys. It visits query tiles of
// kBlockM PackGQA rows. A warp has 16 * kKeyTiles keys: their scores, dK and dV.
//
//   kColumnWarps = 1   A warp has the scores of its keys with all rows of the tile. So P^T and dS^T
//                      are operands of dV += P^T dO and dK += dS^T Q in its registers. Only dS goes
//                      through shared memory, for dQ, which is a sum over all keys of the block.
//   kColumnWarps = 2   From head_dim 192 on, dK and dV of 16 keys exceed one warp's registers. Two
//                      warps share the keys. Each has the scores with half of the rows, and half of
//                      the columns of dK and dV. P goes through shared memory too.
//
// Registers per thread; the choices below leave about 40 of 255 for the rest:
//
//   dK and dV   kKeyTiles * (kHeadDim + kHeadDimV) / 2 / kColumnWarps
//   S and dP    kKeyTiles * kBlockM / kColumnWarps
//   V           kKeyTiles * kHeadDimV / 4, with kValuesInRegisters
//
// Shared memory, in 2-byte elements; at most 99 KB, the limit of a CTA on compute capability 8.6,
// 8.9 and 12.0:
//
//   K           kBlockN * kHeadDim
//   V           kBlockN * kHeadDimV, without kValuesInRegisters
//   Q and dO    kBlockM * (kHeadDim + kHeadDimV), for each of kStages
//   dS          kBlockN * kBlockM, for each of kStages
//   P           kBlockN * kBlockM, with kColumnWarps = 2
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
  static constexpr int kStages = kStages_;  // stages of Q and dO
  static constexpr bool kValuesInRegisters = kValuesInRegisters_;
  static constexpr int kMinBlocks = kMinBlocks_;  // CTAs an SM, by registers

  static constexpr int kWarps = kKeyWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockN = 16 * kKeyTiles * kKeyWarps;
  static constexpr int kWarpRows = kBlockM / kColumnWarps;  // rows of a tile in a warp's scores
  static constexpr int kWarpCols = kHeadDim / kColumnWarps;
  static constexpr int kWarpColsV = kHeadDimV / kColumnWarps;
  // dQ, kBlockM x kHeadDim, is divided in another way: kRowWarps warps along the rows, the others
  // along the columns.
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kDqRows = kBlockM / kRowWarps;
  static constexpr int kDqCols = kHeadDim / (kWarps / kRowWarps);

  static_assert(kStages == 1 || kStages == 2, "stages alternate");
  static_assert(kBlockM % 32 == 0, "rows of the dS tile are whole slabs");
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kWarpColsV % 16 == 0,
                "ldmatrix.x4 loads two operands B, 16 columns");
  static_assert(kDqRows % 16 == 0 && kDqCols % 16 == 0 && kWarps % kRowWarps == 0,
                "each warp has whole 16-row fragments of dQ");
};

// clang-format off
//                                              warps:          rows     V in    row    blocks
//                                 dims   keys columns tiles  a tile stages regs  warps  an SM
template <int kHeadDim, int kHeadDimV>
struct FlashBwdTilesOf;
// 32 keys a warp: each ldmatrix of Q and dO feeds 4 products instead of 2. Two CTAs fit on an SM,
// so that one multiplies while the other waits at a barrier.
template <> struct FlashBwdTilesOf<32, 32>   : FlashBwdTiles<32, 32,    4, 1, 2,  64, 2, false, 4, 2> {};
template <> struct FlashBwdTilesOf<64, 64>   : FlashBwdTiles<64, 64,    4, 1, 2,  32, 2, false, 1, 2> {};
// 16 keys a warp. dK, dV: 96 floats. Two CTAs of 6 warps fit into the registers of an SM.
template <> struct FlashBwdTilesOf<96, 96>   : FlashBwdTiles<96, 96,    6, 1, 1,  32, 2, false, 1, 2> {};
// dK, dV: 128 floats. V in registers leaves shared memory for the second stage.
template <> struct FlashBwdTilesOf<128, 128> : FlashBwdTiles<128, 128,  8, 1, 1,  32, 2, true,  1, 1> {};
template <> struct FlashBwdTilesOf<192, 128> : FlashBwdTiles<192, 128,  4, 2, 1,  32, 2, true,  2, 1> {};
template <> struct FlashBwdTilesOf<192, 192> : FlashBwdTiles<192, 192,  4, 2, 1,  32, 2, true,  2, 1> {};
// One stage: K takes 32 KB, and a stage of Q and dO another 32 KB.
template <> struct FlashBwdTilesOf<256, 256> : FlashBwdTiles<256, 256,  4, 2, 1,  32, 1, true,  1, 1> {};
// clang-format on

}  // namespace sink_attention::cuda::sm80
