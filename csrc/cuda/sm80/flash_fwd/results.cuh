// Writes a CTA's results: out and lse with the sink folded in. With splits: partial results,
// without the sink.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm80/flash_fwd/params.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/row_results.cuh"
#include "primitives/cta.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm80 {

template <class Element, class Tiles>
struct FlashFwdResults : RowResults<FlashFwdKernelParams> {
  static constexpr int kTilesM = Tiles::kTilesM;
  static constexpr int kTilesV = Tiles::kHeadDimV / 8;
  static constexpr int kThreads = Tiles::kThreads;
  using Out = Accumulators<kTilesM, kTilesV>;
  using States = RowStates<kTilesM>;
  using OutTile = SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDimV>;

  using ReductionBuffer = RowReductionBuffer<Tiles::kWarpsN, Tiles::kBlockM, Tiles::kHeadDimV>;
  template <bool kManyWarps, class Unused = void>
  struct StorageOf {
    OutTile tile;
  };
  template <class Unused>
  struct StorageOf<true, Unused> {
    ReductionBuffer reduction_buffer;
  };
  using Storage = StorageOf<(Tiles::kWarpsN > 1)>;

  int row_begin;
  float softmax_scale_log2;

  // All threads call, after a barrier: `storage` overwrites the pipeline's buffers.
  SA_DEVICE void write(Storage& storage, const Out& out, const States& states, int warp_row,
                       int warp_n) const {
    if constexpr (Tiles::kWarpsN > 1) {
      store_to_reduction(storage.reduction_buffer, out, states, warp_row, warp_n);
      primitives::sync_threads();  // all warps have stored their parts of each row
      write_merged_rows<Element>(storage.reduction_buffer, *this, row_begin, primitives::warp_idx(),
                                 kThreads / primitives::kWarpSize);
    } else if (kernel_params.num_splits > 1) {
      write_partial(out, states, warp_row);
    } else {
      finish(storage.tile, out, states, warp_row);
    }
  }

 private:
  // For one warp along N without splits. Rows go through shared memory, so that they are written in
  // 16-byte vectors.
  SA_DEVICE void finish(OutTile& tile, const Out& out, const States& states, int warp_row) const {
    const int lane = primitives::lane_idx();
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, softmax_scale_log2);
        const int gqa_row = row_begin + row;
        const float scale = is_row(gqa_row) ? finish_row(gqa_row, state, lane % 4 == 0) : 0.0f;
        SA_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          const uint32_t pair = primitives::pack<Element>(out.c[m][n][2 * half] * scale,
                                                          out.c[m][n][2 * half + 1] * scale);
          primitives::store_shared(
              reinterpret_cast<uint32_t*>(tile.at(row, 8 * n + accumulator_col(lane, 0))), pair);
        }
      }
    }
    primitives::sync_threads();  // the tile is complete
    store_tile<kThreads>(tile, static_cast<int>(kernel_params.attn.head_dim_v),
                         kernel_params.out_is_vectorised, [&](int row) {
                           return is_row(row_begin + row) ? out_row<Element>(row_begin + row)
                                                          : nullptr;
                         });
  }

  SA_DEVICE void write_partial(const Out& out, const States& states, int warp_row) const {
    const int lane = primitives::lane_idx();
    const int cols = static_cast<int>(kernel_params.attn.head_dim_v);
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int gqa_row = row_begin + warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, softmax_scale_log2);
        if (!is_row(gqa_row)) continue;
        const int64_t index = partial_index(gqa_row);
        if (lane % 4 == 0) write_state(index, state);
        SA_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          SA_UNROLL
          for (int reg = 0; reg < 2; ++reg) {
            const int col = 8 * n + accumulator_col(lane, reg);
            if (col < cols) {
              primitives::store_global(kernel_params.partial_out + index * cols + col,
                                       out.c[m][n][2 * half + reg] * value_scale);
            }
          }
        }
      }
    }
  }

  SA_DEVICE void store_to_reduction(ReductionBuffer& reduction_buffer, const Out& out,
                                    const States& states, int warp_row, int warp_n) const {
    const int lane = primitives::lane_idx();
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, softmax_scale_log2);
        if (lane % 4 == 0) {
          primitives::store_shared(&reduction_buffer.state[warp_n][row],
                                   primitives::Float2{state.max, state.sum});
        }
        SA_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          primitives::store_shared(
              reinterpret_cast<primitives::Float2*>(
                  &reduction_buffer.out[warp_n][row][8 * n + accumulator_col(lane, 0)]),
              primitives::Float2{out.c[m][n][2 * half], out.c[m][n][2 * half + 1]});
        }
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm80
