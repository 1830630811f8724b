// Writes a row's results, final or partial, and merges rows whose keys were divided among warps.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/load_sink.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/convert.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

// KernelParams has `attn`, num_splits, partial_state and partial_out (combine.cuh).
template <class KernelParams>
struct RowResults {
  const KernelParams& kernel_params;
  const PackGqa& rows;
  int split;
  float value_scale;  // factor of the outputs: the scale of an 8-bit cache of values

  SA_DEVICE bool is_row(int gqa_row) const { return gqa_row < rows.num_rows; }

  // Index of a row in partial_state and partial_out.
  SA_DEVICE int64_t partial_index(int gqa_row) const {
    const attention::FlashFwdParams& params = kernel_params.attn;
    const int64_t row =
        rows.info.q_batch * params.seqlen_q + rows.info.q_row + rows.position(gqa_row);
    return (split * params.num_heads_q + rows.head(gqa_row)) * params.total_q + row;
  }

  template <class Element>
  SA_DEVICE Element* out_row(int gqa_row) const {
    const attention::FlashFwdParams& params = kernel_params.attn;
    return static_cast<Element*>(params.out) + rows.offset(gqa_row, params.out_stride_batch,
                                                           params.out_stride_row,
                                                           params.out_stride_head);
  }

  // Folds the sink in and, if `writes`, stores lse. Returns the factor of the row's output.
  SA_DEVICE float finish_row(int gqa_row, attention::RowState<float> state, bool writes) const {
    const attention::FlashFwdParams& params = kernel_params.attn;
    const float sink = load_sink(params, rows.head(gqa_row));
    const attention::RowResult<float> result = attention::fold_sink(state, sink);
    if (writes) {
      float* lse = static_cast<float*>(params.lse) +
                   rows.lse_offset(gqa_row, params.lse_stride_batch, params.lse_stride_head);
      primitives::store_global(lse, result.lse);
    }
    return result.scale * value_scale;
  }

  SA_DEVICE void write_state(int64_t index, attention::RowState<float> state) const {
    primitives::store_global(
        reinterpret_cast<primitives::Float2*>(kernel_params.partial_state) + index,
        primitives::Float2{state.max, state.sum});
  }
};

// The smem reduction buffer: row states and outputs of kParts warps that share rows. Rows are
// padded by 8 floats, so that neighbouring quads write to different banks.
template <int kParts, int kRows, int kCols>
struct RowReductionBuffer {
  primitives::Float2 state[kParts][kRows];
  float out[kParts][kRows][kCols + 8];
};

// Merges and writes the kRows rows of a tile that begins at PackGQA row `row_begin`. Warp `warp`
// takes rows warp, warp + num_warps, ...; a lane takes every 32nd column.
template <class Element, int kParts, int kRows, int kCols, class KernelParams>
SA_DEVICE void write_merged_rows(const RowReductionBuffer<kParts, kRows, kCols>& reduction_buffer,
                                 const RowResults<KernelParams>& results, int row_begin, int warp,
                                 int num_warps) {
  const KernelParams& kernel_params = results.kernel_params;
  const int cols = static_cast<int>(kernel_params.attn.head_dim_v);
  const int lane = primitives::lane_idx();
  for (int row = warp; row < kRows; row += num_warps) {
    const int gqa_row = row_begin + row;
    if (!results.is_row(gqa_row)) return;
    attention::RowState<float> parts[kParts];
    float max = attention::negative_infinity<float>();
    SA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const primitives::Float2 state = primitives::load_shared(&reduction_buffer.state[part][row]);
      parts[part] = {state.x, state.y};
      max = state.x > max ? state.x : max;
    }
    attention::RowState<float> merged{max, 0.0f};
    float factor[kParts];
    SA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      factor[part] = attention::rebase_factor(parts[part].max, max);
      merged.sum += parts[part].sum * factor[part];
    }
    float scale = results.value_scale;
    float* partial = nullptr;
    Element* out = nullptr;
    if (kernel_params.num_splits == 1) {
      scale = results.finish_row(gqa_row, merged, lane == 0);
      out = results.template out_row<Element>(gqa_row);
    } else {
      const int64_t index = results.partial_index(gqa_row);
      if (lane == 0) results.write_state(index, merged);
      partial = kernel_params.partial_out + index * cols;
    }
    SA_UNROLL
    for (int first = 0; first < kCols; first += primitives::kWarpSize) {
      const int col = first + lane;
      if (col >= cols) break;
      float sum = 0.0f;
      SA_UNROLL
      for (int part = 0; part < kParts; ++part) {
        sum += primitives::load_shared(&reduction_buffer.out[part][row][col]) * factor[part];
      }
      if (partial != nullptr) {
        primitives::store_global(partial + col, sum * scale);
      } else {
        const uint32_t pair = primitives::pack<Element>(sum * scale, 0.0f);
        primitives::store_global(out + col, Element{static_cast<uint16_t>(pair)});
      }
    }
  }
}

}  // namespace sink_attention::cuda
