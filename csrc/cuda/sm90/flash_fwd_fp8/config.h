// The float8 forward's tile sizes on Hopper. flash_fwd/config.h explains the parameters.
//
// Registers, floats a thread of a consumer warpgroup:
//     scores S                kBlockN / 2
//     P as operand A          kBlockN / 8
//     output O                kHeadDim / 2
//
// Shared memory, bytes:
//     Q                kQueryStages * kBlockM * kHeadDim
//     K, V and V^T     kStages * 3 * kBlockN * kHeadDim
// A row of V^T has kBlockN keys and consists of whole swizzled slabs: kBlockN is a multiple of 64.
#pragma once

#include "cuda/sm90/flash_fwd/config.h"

namespace sink_attention::cuda::sm90 {

// clang-format off
// FlashFwdTiles<head_dim, head_dim_v, consumers, keys a block, stages of K and V, stages of Q>
template <int kHeadDim>
struct FlashFwdFloat8TilesOf;
template <> struct FlashFwdFloat8TilesOf<64>  : FlashFwdTiles< 64,  64,      3,      128,  4, 2> {};
template <> struct FlashFwdFloat8TilesOf<128> : FlashFwdTiles<128, 128,      2,      128,  3, 2> {};
template <> struct FlashFwdFloat8TilesOf<256> : FlashFwdTiles<256, 256,      2,       64,  3, 2> {};
// clang-format on

}  // namespace sink_attention::cuda::sm90
