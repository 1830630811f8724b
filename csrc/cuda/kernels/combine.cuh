// Combines the partial results of a split-KV forward, and folds the sink in, once.
//
// The speed depends on how many loads are in flight:
//
//     few splits     one warp per row and query head
//     many splits    one CTA per row and query head; each of its 4 warps takes a quarter of them
//
// A lane holds the states of every 32nd split, and every 32nd column of the outputs. A split
// without visible keys has the state (-inf, 0). Its output is never read.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/load_sink.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/kernels/combine.h"
#include "primitives/convert.h"
#include "primitives/cta.h"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

struct CombineParams {
  attention::FlashFwdParams attn;
  int num_tiles;  // CTAs for the longest sequence of a kv head, kRowsPerBlock rows or one each
  int num_splits;
  bool block_per_row;
  Partials partials;
};

template <class Element>
struct CombineKernel {
  using Params = CombineParams;
  static constexpr int kWarps = 4;
  static constexpr int kWarpSize = primitives::kWarpSize;
  static constexpr int kMaxCols = 256;
  struct Config {
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kWarps * kMaxCols * static_cast<int>(sizeof(float));
  };
  static constexpr int kRowsPerBlock = kWarps;

  // CTA (x, y): x = sequence * num_tiles + tile of PackGQA rows (pack_gqa.cuh); y = kv head.
  static SA_DEVICE void run(const Params& parts, char* shared) {
    const attention::FlashFwdParams& params = parts.attn;
    const PackGqa rows =
        pack_gqa(params, primitives::block_idx().x / parts.num_tiles, primitives::block_idx().y);
    const int warp = primitives::warp_idx();
    const int tile = primitives::block_idx().x % parts.num_tiles;
    const int row = parts.block_per_row ? tile : tile * kRowsPerBlock + warp;
    if (row >= rows.num_rows) return;
    const int64_t index = rows.head(row) * params.total_q + rows.info.q_batch * params.seqlen_q +
                          rows.info.q_row + rows.position(row);

    float factors[kStatesPerLane];
    const attention::RowState<float> merged = merge_states(parts, index, factors);
    const attention::RowResult<float> result =
        attention::fold_sink(merged, load_sink(params, rows.head(row)));
    const int lane = primitives::lane_idx();
    if (lane == 0 && (warp == 0 || !parts.block_per_row)) {
      primitives::store_global(
          static_cast<float*>(params.lse) +
              rows.lse_offset(row, params.lse_stride_batch, params.lse_stride_head),
          result.lse);
    }
    const int cols = static_cast<int>(params.head_dim_v);
    Element* out =
        static_cast<Element*>(params.out) +
        rows.offset(row, params.out_stride_batch, params.out_stride_row, params.out_stride_head);
    if (!parts.block_per_row) {
      for (int first = 0; first < cols; first += 2 * kWarpSize) {  // uniform: shuffles follow
        const int col = first + lane;
        float sums[2];
        add_outputs(parts, index, factors, 0, parts.num_splits, col, sums);
        store(out, col, cols, sums[0] * result.scale);
        store(out, col + kWarpSize, cols, sums[1] * result.scale);
      }
      return;
    }
    auto* partial = reinterpret_cast<float (*)[kMaxCols]>(shared);
    const int begin = parts.num_splits * warp / kWarps;
    const int end = parts.num_splits * (warp + 1) / kWarps;
    for (int first = 0; first < cols; first += 2 * kWarpSize) {
      const int col = first + lane;
      float sums[2];
      add_outputs(parts, index, factors, begin, end, col, sums);
      primitives::store_shared(&partial[warp][col], sums[0]);
      primitives::store_shared(&partial[warp][col + kWarpSize], sums[1]);
    }
    primitives::sync_threads();  // the sums of all warps are stored
    for (int col = primitives::thread_idx(); col < cols; col += Config::kThreads) {
      float sum = 0.0f;
      SA_UNROLL
      for (int part = 0; part < kWarps; ++part) sum += primitives::load_shared(&partial[part][col]);
      store(out, col, cols, sum * result.scale);
    }
  }

 private:
  static constexpr int kStatesPerLane = kMaxSplits / kWarpSize;
  static_assert(kStatesPerLane == 2, "add_outputs chooses between two");
  static constexpr float kNone = -1.0f;  // factor of a split without visible keys
  static constexpr int kTogether = 8;    // splits whose outputs are loaded before any is used

  static SA_DEVICE void store(Element* out, int col, int cols, float value) {
    if (col >= cols) return;
    const uint32_t pair = primitives::pack<Element>(value, 0.0f);
    primitives::store_global(out + col, Element{static_cast<uint16_t>(pair)});
  }

  // The state over all splits, in all lanes. factors[i] is the factor of the output of split
  // lane + 32 i. `index` is the row's index in the first split.
  static SA_DEVICE attention::RowState<float> merge_states(const Params& parts, int64_t index,
                                                           float (&factors)[kStatesPerLane]) {
    const int64_t split_stride = parts.attn.num_heads_q * parts.attn.total_q;
    attention::RowState<float> states[kStatesPerLane];
    float max = attention::negative_infinity<float>();
    SA_UNROLL
    for (int i = 0; i < kStatesPerLane; ++i) {
      const int split = primitives::lane_idx() + i * kWarpSize;
      states[i] = {attention::negative_infinity<float>(), 0.0f};
      if (split < parts.num_splits) {
        const primitives::Float2 state = primitives::load_global(
            reinterpret_cast<const primitives::Float2*>(parts.partials.state) + index +
            split * split_stride);
        states[i] = {state.x, state.y};
      }
      max = states[i].max > max ? states[i].max : max;
    }
    SA_UNROLL
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const float other = primitives::shfl_xor(max, mask);
      max = other > max ? other : max;
    }
    float sum = 0.0f;
    SA_UNROLL
    for (int i = 0; i < kStatesPerLane; ++i) {
      const float factor = attention::rebase_factor(states[i].max, max);
      const bool is_empty =
          states[i].max == attention::negative_infinity<float>() && states[i].sum == 0.0f;
      factors[i] = is_empty ? kNone : factor;
      sum += states[i].sum * factor;
    }
    SA_UNROLL
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += primitives::shfl_xor(sum, mask);
    return {max, sum};
  }

  // Sums columns col and col + 32 of the outputs of splits [begin, end). All lanes call.
  static SA_DEVICE void add_outputs(const Params& parts, int64_t index,
                                    const float (&factors)[kStatesPerLane], int begin, int end,
                                    int col, float (&sums)[2]) {
    const int cols = static_cast<int>(parts.attn.head_dim_v);
    const int64_t stride = parts.attn.num_heads_q * parts.attn.total_q * cols;
    const float* first = parts.partials.out + index * cols + col;
    sums[0] = sums[1] = 0.0f;
    for (int together = begin; together < end; together += kTogether) {
      float factor[kTogether];
      float values[kTogether][2];
      SA_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        const int split = together + j;
        const float low = primitives::shfl(factors[0], split % kWarpSize);
        const float high = primitives::shfl(factors[1], split % kWarpSize);
        factor[j] = split >= end ? kNone : split < kWarpSize ? low : high;
        SA_UNROLL
        for (int i = 0; i < 2; ++i) {
          values[j][i] = 0.0f;
          if (factor[j] != kNone && col + i * kWarpSize < cols) {
            values[j][i] = primitives::load_global(first + split * stride + i * kWarpSize);
          }
        }
      }
      SA_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        if (factor[j] == kNone) continue;
        sums[0] += values[j][0] * factor[j];
        sums[1] += values[j][1] * factor[j];
      }
    }
  }
};

}  // namespace sink_attention::cuda
