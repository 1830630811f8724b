// O += P V of a warpgroup, float8: P V of each block of keys by itself, and these sums in float32.
//
// The tensor cores do not add 8-bit products in float32: they cut each product, the accumulator and
// their sum to about 14 bits, toward zero (tests/emulator/wgmma_float8.cpp has what is known of
// it). Beside an accumulator that holds the sum of n products of its size, a product loses 2^-15 n
// to 2^-14 n of itself on average: one accumulator for all keys makes O 7% too small at
// 4096 of them (values of one sign), and from 16384 on a key no longer counts. In the sum of one
// block's 128 keys alone it is 4 parts in 10^4. float32 sums also keep blocks in the order of keys,
// from key 0 on: a row's bits do not depend on its call.
//
// A second accumulator of all columns finds no registers beside the scores. So P V is computed in
// parts of the columns, one after the other in the same registers:
//
//     products      P V 0 | S of the next block      | P V 1
//     float32             | add P V 0; start P V 1   | softmax of S ...               | add P V 1
//
// Two parts leave no gap in the tensor cores' work: the first one's sums are added while the scores
// are computed, and the last one is computed beside the softmax, as in flash_fwd/consumer.cuh. Of
// four (head_dim 256), those in the middle are waited for, while the other warpgroup's products
// run.
#pragma once

#include "cuda/sm90/operands.cuh"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

// V: V^T, a row for each column of head_dim.
template <class Tiles, class VTile>
struct FlashFwdFloat8Output {
  static constexpr int kTiles = Tiles::kHeadDimV / 8;
  static constexpr int kParts = Tiles::kHeadDimV > 128 ? 4 : 2;
  static constexpr int kPartTiles = kTiles / kParts;

  Accumulators<1, kTiles> sum;
  Accumulators<1, kPartTiles> part;

  // Starts O += P V, and after its first part the kGroupsBeside groups that `start_beside` does.
  // The last part is under way in the end, in one group.
  template <int kGroupsBeside, int kSteps, class Start>
  SA_DEVICE void start(const uint32_t (&p)[kSteps][4], const VTile& v, const Start& start_beside) {
    start_part(0, p, v);
    start_beside();
    SA_UNROLL
    for (int next = 1; next < kParts; ++next) {
      if (next == 1) {
        primitives::wgmma_wait<kGroupsBeside>();
      } else {
        primitives::wgmma_wait<0>();
      }
      add_part(next - 1);
      // ptxas would put the sums off until the next part is under way, in registers of its own.
      primitives::warpgroup_fence_operand(sum.c[0]);
      primitives::sync_warp();
      start_part(next, p, v);
    }
  }
  // After a wait for all groups.
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
