// The backward's row-wise kernels: preprocess (delta, ds_aux, zeros) and postprocess (dQ).
//
//   delta  = <dout, out> - dlse
//   ds_aux = sum over rows of exp(s_aux - lse) * -delta
//   dq     = accumulator * softmax_scale, rounded
//
// ds_aux needs no atomics. A CTA stores its tile's part of each head's sum. One CTA a head then
// adds the parts in a fixed order.
#pragma once

#include "attention/numeric.h"
#include "attention/online_softmax.h"
#include "cuda/device/load_sink.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/kernels/bwd_workspace.h"
#include "cuda/tile/copy.cuh"
#include "primitives/convert.h"
#include "primitives/cta.h"
#include "primitives/fast_math.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

struct BwdRowsParams {
  attention::FlashBwdParams bwd;
  BwdWorkspace workspace;
  // Whether each row can be accessed in 16-byte vectors.
  bool out_is_vectorised;
  bool dout_is_vectorised;
  bool dq_is_vectorised;
};

constexpr int kBwdRowsThreads = 128;
constexpr int kMaxTileRows = 128;

// A tile of the workspace and the PackGQA rows in it.
struct BwdRowTile {
  int64_t tile_idx;  // in the workspace, over all kv heads
  PackGqa rows;
  int row_begin;
  int num_rows;  // 0 for an unused tile
};

SA_DEVICE BwdRowTile bwd_row_tile(const BwdRowsParams& params) {
  const BwdWorkspace& workspace = params.workspace;
  const attention::FlashFwdParams& fwd = params.bwd.fwd;
  const int tile = primitives::block_idx().x;
  const int kv_head = primitives::block_idx().y;
  BwdRowTile result{};
  result.tile_idx = int64_t{kv_head} * workspace.num_tiles + tile;
  const int batch_idx = find_sequence(workspace, fwd, tile);
  if (batch_idx < 0) return result;
  result.rows = pack_gqa(fwd, batch_idx, kv_head);
  const int64_t begin = int64_t{tile - first_tile(workspace, fwd, batch_idx)} * workspace.used_rows;
  if (begin >= result.rows.num_rows) return result;
  result.row_begin = static_cast<int>(begin);
  result.num_rows = static_cast<int>(
      attention::min_of(workspace.used_rows, result.rows.num_rows - result.row_begin));
  return result;
}

// Computes first_tiles: where packed sequences start in the workspace. One CTA. Thread t counts the
// tiles of a few neighbouring sequences; a prefix sum over the threads gives their start.
struct BwdFirstTiles {
  using Params = BwdRowsParams;
  struct Config {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * sizeof(int64_t);
  };

  static SA_DEVICE void run(const Params& params, char* shared) {
    int64_t* sums = reinterpret_cast<int64_t*>(shared);
    const BwdWorkspace& workspace = params.workspace;
    const int thread = primitives::thread_idx();
    const int64_t batch = params.bwd.fwd.batch;
    const int64_t share = (batch + Config::kThreads - 1) / Config::kThreads;
    const int64_t begin = attention::min_of(thread * share, batch);
    const int64_t end = attention::min_of(begin + share, batch);
    int64_t own = 0;
    for (int64_t i = begin; i < end; ++i) own += tiles_of(params, i);
    int64_t sum = own;  // inclusive prefix sum over the threads
    for (int step = 1; step < Config::kThreads; step *= 2) {
      primitives::store_shared(sums + thread, sum);
      primitives::sync_threads();  // all sums are stored
      if (thread >= step) sum += primitives::load_shared(sums + thread - step);
      primitives::sync_threads();  // all sums are read: the next round overwrites them
    }
    int64_t next = sum - own;
    for (int64_t i = begin; i < end; ++i) {
      primitives::store_global(workspace.first_tiles + i,
                               static_cast<int>(attention::min_of(next, workspace.num_tiles)));
      next += tiles_of(params, i);
    }
  }

  static SA_DEVICE int64_t tiles_of(const Params& params, int64_t batch_idx) {
    const attention::FlashFwdParams& fwd = params.bwd.fwd;
    const int64_t rows =
        attention::seqlen_info(fwd, batch_idx).seqlen_q * (fwd.num_heads_q / fwd.num_heads_kv);
    return (rows + params.workspace.used_rows - 1) / params.workspace.used_rows;
  }
};

// One CTA per tile and kv head. 8 lanes share a row: lane i of them takes 16-byte vectors i, i + 8,
// and so on.
template <class Element>
struct BwdPreprocess {
  using Params = BwdRowsParams;
  struct Config {
    static constexpr int kThreads = kBwdRowsThreads;
    static constexpr int kMinBlocks = 4;
    static constexpr int kSharedBytes = kMaxTileRows * sizeof(float);
  };
  static constexpr int kLanesPerRow = 8;
  static constexpr int kRowsPerPass = Config::kThreads / kLanesPerRow;

  static SA_DEVICE void run(const Params& params, char* shared) {
    const BwdWorkspace& workspace = params.workspace;
    float* sink_terms = reinterpret_cast<float*>(shared);  // [tile_rows]
    const BwdRowTile tile = bwd_row_tile(params);
    const int thread = primitives::thread_idx();
    if (workspace.dq_semaphores != nullptr && thread == 0) {
      primitives::store_global(workspace.dq_semaphores + tile.tile_idx, 0);
    }
    if (tile.num_rows > 0) {
      const int dq_floats = workspace.tile_rows * workspace.dq_cols;
      float* dq = workspace.dq + tile.tile_idx * dq_floats;
      for (int i = 4 * thread; i < dq_floats; i += 4 * Config::kThreads) {
        primitives::store_global(reinterpret_cast<primitives::Float4*>(dq + i),
                                 primitives::Float4{0, 0, 0, 0});
      }
      // tile_rows is a multiple of kRowsPerPass. The number of rounds is uniform, as the compiler
      // can see: the loop body has shuffles.
      for (int pass = 0; pass < workspace.tile_rows; pass += kRowsPerPass) {
        const int row = pass + thread / kLanesPerRow;
        const float dot = dot_of_row(params, tile, row);
        if (thread % kLanesPerRow == 0) finish_row(params, tile, row, dot, sink_terms + row);
      }
    }
    if (workspace.sink_terms == nullptr) return;
    primitives::sync_threads();  // the terms of all rows are stored
    store_sink_terms(params, tile, sink_terms);
  }

  // <dout, out> of a row, in all lanes of the row.
  static SA_DEVICE float dot_of_row(const Params& params, const BwdRowTile& tile, int row) {
    const attention::FlashBwdParams& bwd = params.bwd;
    const attention::FlashFwdParams& fwd = bwd.fwd;
    float dot = 0;
    if (row < tile.num_rows) {
      const int gqa_row = tile.row_begin + row;
      const Element* out =
          static_cast<const Element*>(fwd.out) +
          tile.rows.offset(gqa_row, fwd.out_stride_batch, fwd.out_stride_row, fwd.out_stride_head);
      const Element* dout = static_cast<const Element*>(bwd.dout) +
                            tile.rows.offset(gqa_row, bwd.dout_stride_batch, bwd.dout_stride_row,
                                             bwd.dout_stride_head);
      const int cols = static_cast<int>(fwd.head_dim_v);
      const int first = primitives::thread_idx() % kLanesPerRow * kChunkElems;
      for (int col = first; col < cols; col += kLanesPerRow * kChunkElems) {
        dot += dot_of_chunks(load_chunk(out, col, cols, params.out_is_vectorised),
                             load_chunk(dout, col, cols, params.dout_is_vectorised));
      }
    }
    SA_UNROLL
    for (int mask = 1; mask < kLanesPerRow; mask *= 2) dot += primitives::shfl_xor(dot, mask);
    return dot;
  }

  static SA_DEVICE primitives::Bytes16 load_chunk(const Element* row, int col, int cols,
                                                  bool is_vectorised) {
    return is_vectorised
               ? primitives::load_global(reinterpret_cast<const primitives::Bytes16*>(row + col))
               : gather_chunk(row, col, cols);
  }

  static SA_DEVICE float dot_of_chunks(const primitives::Bytes16& a, const primitives::Bytes16& b) {
    float sum = 0;
    SA_UNROLL
    for (int i = 0; i < 4; ++i) {
      float a_low, a_high, b_low, b_high;
      primitives::unpack<Element>(a.word[i], a_low, a_high);
      primitives::unpack<Element>(b.word[i], b_low, b_high);
      sum += a_low * b_low + a_high * b_high;
    }
    return sum;
  }

  static SA_DEVICE void finish_row(const Params& params, const BwdRowTile& tile, int row, float dot,
                                   float* sink_term) {
    const attention::FlashBwdParams& bwd = params.bwd;
    const attention::FlashFwdParams& fwd = bwd.fwd;
    constexpr float kLog2E = static_cast<float>(attention::kLog2E);
    // lse_log2 = +inf gives P = 0. It is used beyond the last row, and for rows without visible
    // keys, whose lse is -inf.
    float lse_log2 = -attention::negative_infinity<float>();
    float delta = 0;
    float term = 0;
    if (row < tile.num_rows) {
      const int gqa_row = tile.row_begin + row;
      const float lse = primitives::load_global(
          static_cast<const float*>(fwd.lse) +
          tile.rows.lse_offset(gqa_row, fwd.lse_stride_batch, fwd.lse_stride_head));
      if (lse != attention::negative_infinity<float>()) lse_log2 = lse * kLog2E;
      delta = dot;
      if (bwd.dlse != nullptr) {
        delta -=
            primitives::load_global(static_cast<const float*>(bwd.dlse) +
                                    tile.rows.offset(gqa_row, bwd.dlse_stride_batch,
                                                     bwd.dlse_stride_row, bwd.dlse_stride_head));
      }
      const float sink = load_sink(fwd, tile.rows.head(gqa_row));
      if (sink != attention::negative_infinity<float>()) {
        // They are equal where both are +inf, and for a row without visible keys.
        const float p_sink = lse == sink ? 1.0f : primitives::exp2_approx((sink - lse) * kLog2E);
        term = -p_sink * delta;
      }
    }
    const int64_t at = tile.tile_idx * params.workspace.tile_rows + row;
    primitives::store_global(params.workspace.lse_log2 + at, lse_log2);
    primitives::store_global(params.workspace.delta + at, delta);
    primitives::store_shared(sink_term, term);
  }

  // Thread t sums the rows of query heads t, t + kThreads, ... of the kv head, in ascending order.
  // An unused tile stores zeros.
  static SA_DEVICE void store_sink_terms(const Params& params, const BwdRowTile& tile,
                                         const float* sink_terms) {
    const BwdWorkspace& workspace = params.workspace;
    const attention::FlashFwdParams& fwd = params.bwd.fwd;
    const int qhead_per_khead = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
    for (int g = primitives::thread_idx(); g < qhead_per_khead; g += Config::kThreads) {
      float sum = 0;
      const int first = (g - tile.row_begin % qhead_per_khead + qhead_per_khead) % qhead_per_khead;
      for (int row = first; row < tile.num_rows; row += qhead_per_khead) {
        sum += primitives::load_shared(sink_terms + row);
      }
      const int64_t head = int64_t{primitives::block_idx().y} * qhead_per_khead + g;
      primitives::store_global(
          workspace.sink_terms + head * workspace.num_tiles + primitives::block_idx().x, sum);
    }
  }
};

// ds_aux of head block_idx().x. Thread t sums tiles t, t + kThreads, ...; a tree reduction over the
// threads follows.
struct BwdSinkGradient {
  using Params = BwdRowsParams;
  struct Config {
    static constexpr int kThreads = kBwdRowsThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * sizeof(double);
  };

  static SA_DEVICE void run(const Params& params, char* shared) {
    double* sums = reinterpret_cast<double*>(shared);
    const BwdWorkspace& workspace = params.workspace;
    const int thread = primitives::thread_idx();
    const int head = primitives::block_idx().x;
    const float* terms = workspace.sink_terms + int64_t{head} * workspace.num_tiles;
    double sum = 0;
    for (int tile = thread; tile < workspace.num_tiles; tile += Config::kThreads) {
      sum += static_cast<double>(primitives::load_global(terms + tile));
    }
    for (int half = Config::kThreads / 2; half > 0; half /= 2) {
      if (thread < 2 * half) primitives::store_shared(sums + thread, sum);
      primitives::sync_threads();  // both halves are stored
      if (thread < half) sum += primitives::load_shared(sums + thread + half);
      primitives::sync_threads();  // they are read: the next round overwrites them
    }
    if (thread == 0) store(params.bwd, head, sum);
  }

  static SA_DEVICE void store(const attention::FlashBwdParams& bwd, int head, double value) {
    using primitives::store_global;
    const float rounded = static_cast<float>(value);
    switch (bwd.fwd.s_aux_dtype) {
      case attention::DataType::kFloat64:
        return store_global(static_cast<double*>(bwd.ds_aux) + head, value);
      case attention::DataType::kFloat32:
        return store_global(static_cast<float*>(bwd.ds_aux) + head, rounded);
      case attention::DataType::kFloat16:
        return store_global(static_cast<attention::Float16*>(bwd.ds_aux) + head,
                            attention::to_float16(rounded));
      default:
        return store_global(static_cast<attention::BFloat16*>(bwd.ds_aux) + head,
                            attention::to_bfloat16(rounded));
    }
  }
};

// One CTA per tile and kv head. A thread takes 8 columns of a row at a time. In the accumulator
// these are registers of 4 neighbouring lanes of a fragment: 4 floats of even columns, and 4 floats
// of odd columns 32 floats later.
template <class Element>
struct BwdPostprocess {
  using Params = BwdRowsParams;
  struct Config {
    static constexpr int kThreads = kBwdRowsThreads;
    static constexpr int kMinBlocks = 4;
    static constexpr int kSharedBytes = 0;
  };

  static SA_DEVICE void run(const Params& params, char*) {
    const attention::FlashBwdParams& bwd = params.bwd;
    const BwdWorkspace& workspace = params.workspace;
    const BwdRowTile tile = bwd_row_tile(params);
    const int cols = static_cast<int>(bwd.fwd.head_dim);
    const int chunks = (cols + kChunkElems - 1) / kChunkElems;
    const float scale = static_cast<float>(bwd.fwd.softmax_scale);
    const float* accumulator =
        workspace.dq + tile.tile_idx * (workspace.tile_rows * workspace.dq_cols);
    for (int i = primitives::thread_idx(); i < tile.num_rows * chunks; i += Config::kThreads) {
      const int row = i / chunks;
      const int chunk = i % chunks;
      const int fragment = row / 16 * (workspace.dq_cols / 8) + chunk;
      const float* even_cols = accumulator + fragment * 128 + row % 16 / 8 * 64 + row % 8 * 4;
      const auto even = primitives::load_global(reinterpret_cast<const Float4*>(even_cols));
      const auto odd = primitives::load_global(reinterpret_cast<const Float4*>(even_cols + 32));
      const primitives::Bytes16 vector{{primitives::pack<Element>(even.x * scale, odd.x * scale),
                                        primitives::pack<Element>(even.y * scale, odd.y * scale),
                                        primitives::pack<Element>(even.z * scale, odd.z * scale),
                                        primitives::pack<Element>(even.w * scale, odd.w * scale)}};
      Element* dq = static_cast<Element*>(bwd.dq) +
                    tile.rows.offset(tile.row_begin + row, bwd.dq_stride_batch, bwd.dq_stride_row,
                                     bwd.dq_stride_head);
      store_chunk(dq, chunk * kChunkElems, cols, params.dq_is_vectorised, vector);
    }
  }

 private:
  using Float4 = primitives::Float4;
};

}  // namespace sink_attention::cuda
