// What a thread block leaves: out and lse with the sink folded in, or, where other blocks have
// other keys of the same rows, partial results without it.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/common/load_sink.cuh"
#include "cuda/sm80/flash_fwd/problem.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "cuda/tile/soften.cuh"
#include "primitives/cta.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm80 {

template <class Element, class Tiles>
struct FlashFwdResults {
  static constexpr int kTilesM = Tiles::kTilesM;
  static constexpr int kTilesV = Tiles::kHeadDimV / 8;
  static constexpr int kThreads = Tiles::kThreads;
  using Out = Accumulators<kTilesM, kTilesV>;
  using States = RowStates<kTilesM>;
  using OutTile = SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDimV>;

  // Of each warp along N, its rows' states and outputs. The pad keeps the rows of a quad's
  // neighbours in other banks.
  struct Exchange {
    primitives::Float2 state[Tiles::kWarpsN][Tiles::kBlockM];
    float out[Tiles::kWarpsN][Tiles::kBlockM][Tiles::kHeadDimV + 8];
  };
  template <bool kManyWarps, class Unused = void>
  struct StorageOf {
    OutTile tile;
  };
  template <class Unused>
  struct StorageOf<true, Unused> {
    Exchange exchange;
  };
  using Storage = StorageOf<(Tiles::kWarpsN > 1)>;

  const FlashFwdKernelProblem& kernel_problem;
  const PackedRows& rows;
  int row_begin;
  int split;
  float value_scale;  // of a float8 cache
  float to_log2;

  // Called by all threads, when no one reads shared memory's earlier contents any more.
  SA_DEVICE void write(Storage& storage, const Out& out, const States& states, int warp_row,
                       int warp_n) const {
    if constexpr (Tiles::kWarpsN > 1) {
      leave_in_exchange(storage.exchange, out, states, warp_row, warp_n);
      primitives::sync_threads();  // the warps' parts of each row are there
      write_merged(storage.exchange);
    } else if (kernel_problem.num_splits > 1) {
      write_partial(out, states, warp_row);
    } else {
      finish(storage.tile, out, states, warp_row);
    }
  }

 private:
  SA_DEVICE bool is_row(int packed_row) const { return packed_row < rows.num_rows; }

  // Index of a row among partial results.
  SA_DEVICE int64_t partial_index(int packed_row) const {
    const attention::FlashFwdProblem& problem = kernel_problem.problem;
    const int64_t row =
        rows.info.q_batch * problem.seqlen_q + rows.info.q_row + rows.position(packed_row);
    return (split * problem.num_heads_q + rows.head(packed_row)) * problem.total_q + row;
  }

  SA_DEVICE Element* out_row(int packed_row) const {
    const attention::FlashFwdProblem& problem = kernel_problem.problem;
    return static_cast<Element*>(problem.out) + rows.offset(packed_row, problem.out_stride_batch,
                                                            problem.out_stride_row,
                                                            problem.out_stride_head);
  }

  // Folds the sink in and writes lse. Returns what the row's output is to be multiplied with.
  SA_DEVICE float finish_row(int packed_row, attention::RowState<float> state, bool writes) const {
    const attention::FlashFwdProblem& problem = kernel_problem.problem;
    const float sink = load_sink(problem, rows.head(packed_row));
    const attention::RowResult<float> result = attention::fold_sink(state, sink);
    if (writes) {
      float* lse = static_cast<float*>(problem.lse) +
                   rows.lse_offset(packed_row, problem.lse_stride_batch, problem.lse_stride_head);
      primitives::store_global(lse, result.lse);
    }
    return result.scale * value_scale;
  }

  // One warp along N, no splits: through shared memory, so that rows are written 16 bytes at a
  // time.
  SA_DEVICE void finish(OutTile& tile, const Out& out, const States& states, int warp_row) const {
    const int lane = primitives::lane_idx();
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, to_log2);
        const int packed_row = row_begin + row;
        const float scale =
            is_row(packed_row) ? finish_row(packed_row, state, lane % 4 == 0) : 0.0f;
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
    store_tile<kThreads>(
        tile, static_cast<int>(kernel_problem.problem.head_dim_v), kernel_problem.out_in_chunks,
        [&](int row) { return is_row(row_begin + row) ? out_row(row_begin + row) : nullptr; });
  }

  SA_DEVICE void write_partial(const Out& out, const States& states, int warp_row) const {
    const int lane = primitives::lane_idx();
    const int cols = static_cast<int>(kernel_problem.problem.head_dim_v);
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int packed_row = row_begin + warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, to_log2);
        if (!is_row(packed_row)) continue;
        const int64_t index = partial_index(packed_row);
        if (lane % 4 == 0) write_state(index, state);
        SA_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          SA_UNROLL
          for (int reg = 0; reg < 2; ++reg) {
            const int col = 8 * n + accumulator_col(lane, reg);
            if (col < cols) {
              primitives::store_global(kernel_problem.partial_out + index * cols + col,
                                       out.c[m][n][2 * half + reg] * value_scale);
            }
          }
        }
      }
    }
  }

  SA_DEVICE void write_state(int64_t index, attention::RowState<float> state) const {
    primitives::store_global(
        reinterpret_cast<primitives::Float2*>(kernel_problem.partial_state) + index,
        primitives::Float2{state.max, state.sum});
  }

  SA_DEVICE void leave_in_exchange(Exchange& exchange, const Out& out, const States& states,
                                   int warp_row, int warp_n) const {
    const int lane = primitives::lane_idx();
    SA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + accumulator_row(lane, 2 * half);
        const attention::RowState<float> state = states.whole(m, half, to_log2);
        if (lane % 4 == 0) {
          primitives::store_shared(&exchange.state[warp_n][row],
                                   primitives::Float2{state.max, state.sum});
        }
        SA_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          primitives::store_shared(
              reinterpret_cast<primitives::Float2*>(
                  &exchange.out[warp_n][row][8 * n + accumulator_col(lane, 0)]),
              primitives::Float2{out.c[m][n][2 * half], out.c[m][n][2 * half + 1]});
        }
      }
    }
  }

  // A warp takes whole rows, a lane every 32nd column of it.
  SA_DEVICE void write_merged(const Exchange& exchange) const {
    const int cols = static_cast<int>(kernel_problem.problem.head_dim_v);
    const int lane = primitives::lane_idx();
    for (int row = primitives::warp_idx(); row < Tiles::kBlockM; row += kThreads / 32) {
      const int packed_row = row_begin + row;
      if (!is_row(packed_row)) return;
      attention::RowState<float> parts[Tiles::kWarpsN];
      float max = attention::negative_infinity<float>();
      SA_UNROLL
      for (int part = 0; part < Tiles::kWarpsN; ++part) {
        const primitives::Float2 state = primitives::load_shared(&exchange.state[part][row]);
        parts[part] = {state.x, state.y};
        max = state.x > max ? state.x : max;
      }
      attention::RowState<float> merged{max, 0.0f};
      float factor[Tiles::kWarpsN];
      SA_UNROLL
      for (int part = 0; part < Tiles::kWarpsN; ++part) {
        factor[part] = attention::rebase_factor(parts[part].max, max);
        merged.sum += parts[part].sum * factor[part];
      }
      float scale = value_scale;
      if (kernel_problem.num_splits == 1) {
        scale = finish_row(packed_row, merged, lane == 0);
      } else if (lane == 0) {
        write_state(partial_index(packed_row), merged);
      }
      for (int col = lane; col < cols; col += primitives::kWarpSize) {
        float sum = 0.0f;
        SA_UNROLL
        for (int part = 0; part < Tiles::kWarpsN; ++part) {
          sum += primitives::load_shared(&exchange.out[part][row][col]) * factor[part];
        }
        if (kernel_problem.num_splits == 1) {
          const uint32_t pair = primitives::pack<Element>(sum * scale, 0.0f);
          primitives::store_global(out_row(packed_row) + col, Element{static_cast<uint16_t>(pair)});
        } else {
          primitives::store_global(
              kernel_problem.partial_out + partial_index(packed_row) * cols + col, sum * scale);
        }
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm80
