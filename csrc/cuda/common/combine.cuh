// Joins the partial results of a forward whose keys were split, and folds the sink in, once.
//
// A warp takes one row of one head; its lanes take every 32nd column. A split that saw no key has
// the state (-inf, 0) and is passed over: its output is never read.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/common/load_sink.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "primitives/convert.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

struct CombineProblem {
  attention::FlashFwdProblem problem;
  int num_tiles;  // of the longest sequence and one kv head
  int num_splits;
  // [num_splits][num_heads_q][total_q], as FlashFwdKernelProblem has them
  const float* partial_state;
  const float* partial_out;
};

template <class Element>
struct CombineKernel {
  using Problem = CombineProblem;
  struct Config {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
  };
  static constexpr int kRowsPerBlock = Config::kThreads / primitives::kWarpSize;

  // Block (x, y): x counts the tiles of kRowsPerBlock rows (packed_rows.cuh) within the sequences;
  // y is the kv head.
  static SA_DEVICE void run(const Problem& parts, char*) {
    const attention::FlashFwdProblem& problem = parts.problem;
    const PackedRows rows = packed_rows(problem, primitives::block_idx().x / parts.num_tiles,
                                        primitives::block_idx().y);
    const int row =
        primitives::block_idx().x % parts.num_tiles * kRowsPerBlock + primitives::warp_idx();
    if (row >= rows.num_rows) return;
    const int64_t split_stride = problem.num_heads_q * problem.total_q;
    const int64_t index = rows.head(row) * problem.total_q + rows.info.q_batch * problem.seqlen_q +
                          rows.info.q_row + rows.position(row);

    attention::RowState<float> merged{attention::negative_infinity<float>(), 0.0f};
    for (int split = 0; split < parts.num_splits; ++split) {
      const attention::RowState<float> state = load_state(parts, index + split * split_stride);
      const float max = state.max > merged.max ? state.max : merged.max;
      merged.sum = merged.sum * attention::rebase_factor(merged.max, max) +
                   state.sum * attention::rebase_factor(state.max, max);
      merged.max = max;
    }
    const attention::RowResult<float> result =
        attention::fold_sink(merged, load_sink(problem, rows.head(row)));
    const int lane = primitives::lane_idx();
    if (lane == 0) {
      primitives::store_global(
          static_cast<float*>(problem.lse) +
              rows.lse_offset(row, problem.lse_stride_batch, problem.lse_stride_head),
          result.lse);
    }
    const int cols = static_cast<int>(problem.head_dim_v);
    Element* out =
        static_cast<Element*>(problem.out) +
        rows.offset(row, problem.out_stride_batch, problem.out_stride_row, problem.out_stride_head);
    for (int col = lane; col < cols; col += primitives::kWarpSize) {
      float sum = 0.0f;
      for (int split = 0; split < parts.num_splits; ++split) {
        const int64_t part = index + split * split_stride;
        const attention::RowState<float> state = load_state(parts, part);
        if (state.max == attention::negative_infinity<float>() && state.sum == 0.0f) continue;
        sum += primitives::load_global(parts.partial_out + part * cols + col) *
               attention::rebase_factor(state.max, merged.max);
      }
      const uint32_t pair = primitives::pack<Element>(sum * result.scale, 0.0f);
      primitives::store_global(out + col, Element{static_cast<uint16_t>(pair)});
    }
  }

 private:
  static SA_DEVICE attention::RowState<float> load_state(const Problem& parts, int64_t index) {
    const primitives::Float2 state = primitives::load_global(
        reinterpret_cast<const primitives::Float2*>(parts.partial_state) + index);
    return {state.x, state.y};
  }
};

}  // namespace sink_attention::cuda
