// O += P V of a warpgroup in float8: P V of each block of keys is one wgmma sum; float32 adds them.
//
// The tensor cores do not accumulate 8-bit products in float32. They truncate each product, the
// accumulator and their sum to about 14 bits (sources in tests/emulator/wgmma_float8.cpp). With an
// accumulator that holds n products of equal size, a product loses 2^-15 n to 2^-14 n of itself on
// average:
//
//     one accumulator for all keys      O is 7% too small at 4096 keys (values of one sign);
//                                       from 16384 on, another key no longer counts
//     one accumulator a block of 128    the error is 4 parts in 10^4
//
// The float32 sums also keep blocks in the order of keys, from key 0 on. So a row's bits do not
// depend on the call that it is in.
//
// A second accumulator of all columns does not fit into the registers beside S. So P V is computed
// in parts of the columns, one after the other in the same registers:
//
//     products      P V 0 | S of the next block      | P V 1
//     float32             | add P V 0; start P V 1   | softmax of S ...               | add P V 1
//
// Two parts leave the tensor cores no gap. The first part is added while S is computed; the last is
// computed during the softmax, as in flash_fwd/consumer.cuh. Of four parts (head_dim 256), those in
// the middle are waited for, while the other warpgroup's products run.
#pragma once

#include "cuda/sm90/operands.cuh"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

// VTile: V^T, a row for each column of V.
template <class Tiles, class VTile>
struct FlashFwdFp8Output {
  static constexpr int kTiles = Tiles::kHeadDimV / 8;
  static constexpr int kParts = Tiles::kHeadDimV > 128 ? 4 : 2;
  static constexpr int kPartTiles = kTiles / kParts;

  Accumulators<1, kTiles> sum;
  Accumulators<1, kPartTiles> part;

  // Starts O += P V. After its first part, start_overlapped() commits kOverlappedGroups groups. On
  // return the last part is in flight, as one group.
  template <int kOverlappedGroups, int kSteps, class Start>
  SA_DEVICE void start(const uint32_t (&p)[kSteps][4], const VTile& v,
                       const Start& start_overlapped) {
    start_part(0, p, v);
    start_overlapped();
    SA_UNROLL
    for (int next = 1; next < kParts; ++next) {
      if (next == 1) {
        primitives::wgmma_wait<kOverlappedGroups>();
      } else {
        primitives::wgmma_wait<0>();
      }
      add_part(next - 1);
      // Without these two, ptxas delays the adds until the next part is in flight, in registers of
      // its own.
      primitives::warpgroup_fence_operand(sum.c[0]);
      primitives::sync_warp();
      start_part(next, p, v);
    }
  }
  // Call after wgmma_wait<0>.
  SA_DEVICE void finish() { add_part(kParts - 1); }

 private:
  template <int kSteps>
  SA_DEVICE void start_part(int index, const uint32_t (&p)[kSteps][4], const VTile& v) {
    primitives::warpgroup_fence_operand(part.c[0]);
    primitives::warpgroup_arrive();
    start_abt(part, p, v, 8 * kPartTiles * index, false);
    primitives::wgmma_commit();
  }
  SA_DEVICE void add_part(int index) {
    primitives::warpgroup_fence_operand(part.c[0]);
    SA_UNROLL
    for (int n = 0; n < kPartTiles; ++n) {
      SA_UNROLL
      for (int i = 0; i < 4; ++i) sum.c[0][kPartTiles * index + n][i] += part.c[0][n][i];
    }
  }
};

}  // namespace sink_attention::cuda::sm90
