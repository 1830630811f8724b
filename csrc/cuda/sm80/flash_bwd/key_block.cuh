// Rows of a block of keys in global memory, and the store of its gradients.
#pragma once

#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragment.cuh"
#include "primitives/convert.h"
#include "primitives/cta.h"

namespace sink_attention::cuda::sm80 {

// Address of a key's row in a tensor; null for a key beyond the sequence.
template <class T>
struct BlockRows {
  T* first;
  int64_t stride_row;
  int num_keys;
  SA_DEVICE T* operator()(int key) const {
    return key < num_keys ? first + key * stride_row : nullptr;
  }
};

// Writes scale * gradient to global memory through a tile in shared memory, so that threads write
// 16-byte vectors. A warp's accumulators begin at (warp_key, warp_col). The caller needs a barrier
// before the tile is used again.
template <int kThreads, int kTilesM, int kTilesN, class Tile>
SA_DEVICE void store_gradient(const Accumulators<kTilesM, kTilesN>& gradient, float scale,
                              Tile& tile, int warp_key, int warp_col, int thread,
                              const BlockRows<typename Tile::Element>& rows, int cols,
                              bool is_vectorised) {
  const int lane = thread % primitives::kWarpSize;
  SA_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    SA_UNROLL
    for (int n = 0; n < kTilesN; ++n) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        auto* target = tile.at(warp_key + 16 * m + accumulator_row(lane, 2 * half),
                               warp_col + 8 * n + accumulator_col(lane, 0));
        primitives::store_shared(
            reinterpret_cast<uint32_t*>(target),
            primitives::pack<typename Tile::Element>(gradient.c[m][n][2 * half] * scale,
                                                     gradient.c[m][n][2 * half + 1] * scale));
      }
    }
  }
  primitives::sync_threads();  // the tile is complete
  store_tile<kThreads>(tile, cols, is_vectorised, rows, thread);
}

}  // namespace sink_attention::cuda::sm80
