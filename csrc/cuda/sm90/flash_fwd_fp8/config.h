// The float8 forward's tile sizes on Hopper (flash_fwd/config.h says what they mean).
//
// Registers, floats a thread of a computing warpgroup: the scores kBlockN / 2, the weights as
// operands kBlockN / 8, the output kHeadDim / 2. Shared memory, bytes: kQueryStages times Q,
// kBlockM * kHeadDim, and kStages times K, V and V^T, 3 * kBlockN * kHeadDim. V^T's rows are
// kBlockN keys, whole slabs of a swizzle, so kBlockN is a multiple of 64.
#pragma once

#include "cuda/sm90/flash_fwd/config.h"

namespace sink_attention::cuda::sm90 {

// clang-format off
//                                                           dims  warpgroups  keys  stages of K, Q
template <int kHeadDim>
struct FlashFwdFloat8TilesOf;
template <> struct FlashFwdFloat8TilesOf<64>  : FlashFwdTiles< 64,  64,      3,      128,  4, 2> {};
template <> struct FlashFwdFloat8TilesOf<128> : FlashFwdTiles<128, 128,      2,      128,  3, 2> {};
template <> struct FlashFwdFloat8TilesOf<256> : FlashFwdTiles<256, 256,      2,       64,  3, 2> {};
// clang-format on

}  // namespace sink_attention::cuda::sm90
