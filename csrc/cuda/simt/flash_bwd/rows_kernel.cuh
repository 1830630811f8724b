// The backward's preprocess kernels in float32 or float64:
//
//   delta  = <dout, out> - dlse                          FlashBwdDeltaKernel
//   ds_aux = sum over rows of exp(s_aux - lse) * -delta  FlashBwdSinkKernel
#pragma once

#include <cmath>

#include "cuda/device/element.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/scores.cuh"
#include "primitives/cta.h"
#include "primitives/memory.h"

namespace sink_attention::cuda::simt {

template <class Real>
struct FlashBwdRowsParams {
  attention::FlashBwdParams bwd;
  Real* delta;    // [num_heads_q][total_q]
  int num_tiles;  // row tiles of the longest sequence
};

// One CTA per tile of 64 PackGQA rows. 16 lanes share a row: lane i of them takes elements i,
// i + 16, and so on.
template <class Real>
struct FlashBwdDeltaKernel {
  using Params = FlashBwdRowsParams<Real>;
  static constexpr int kBlockM = 64;
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
  };

  static SA_DEVICE void run(const Params& kernel_params, char*) {
    const attention::FlashBwdParams& bwd = kernel_params.bwd;
    const attention::FlashFwdParams& params = bwd.fwd;
    const TileCoord coord = tile_coord(params, kernel_params.num_tiles);
    const PackGqa rows = pack_gqa(params, coord.batch_idx, coord.kv_head);
    const int row_begin = coord.tile * kBlockM;
    if (row_begin >= rows.num_rows) return;
    // The number of rounds is uniform, as the compiler can see: the loop has shuffles.
    for (int pass = 0; pass < kBlockM; pass += kThreadRows) {
      const int row = row_begin + pass + thread_y();
      const bool exists = row < rows.num_rows;
      Real sum = Real(0);
      if (exists) {
        const Real* out = static_cast<const Real*>(params.out) +
                          rows.offset(row, params.out_stride_batch, params.out_stride_row,
                                      params.out_stride_head);
        const Real* dout =
            static_cast<const Real*>(bwd.dout) +
            rows.offset(row, bwd.dout_stride_batch, bwd.dout_stride_row, bwd.dout_stride_head);
        for (int d = thread_x(); d < static_cast<int>(params.head_dim_v); d += kThreadCols) {
          sum += primitives::load_global(out + d) * primitives::load_global(dout + d);
        }
      }
      sum = sum_over_row(sum);  // by all lanes, also without a row
      if (!exists || thread_x() != 0) continue;
      if (bwd.dlse != nullptr) {
        sum -= primitives::load_global(
            static_cast<const Real*>(bwd.dlse) +
            rows.offset(row, bwd.dlse_stride_batch, bwd.dlse_stride_row, bwd.dlse_stride_head));
      }
      primitives::store_global(
          kernel_params.delta + rows.lse_offset(row, params.seqlen_q, params.total_q), sum);
    }
  }
};

// One CTA per query head. Thread t sums rows t, t + 128, ... of each sequence; a tree reduction
// over the threads follows. The order is fixed.
template <class Real>
struct FlashBwdSinkKernel {
  using Params = FlashBwdRowsParams<Real>;
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * sizeof(double);
  };

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashFwdParams& params = kernel_params.bwd.fwd;
    double* sums = reinterpret_cast<double*>(shared);
    const int head = primitives::block_idx().x;
    const int thread = primitives::thread_idx();
    // Rounded to Real as in the forward, so that exp(s_aux - lse) is 1 for a row without keys.
    const double sink =
        static_cast<double>(load_element<Real>(params.s_aux, params.s_aux_dtype, head));
    double sum = 0;
    if (sink != attention::negative_infinity<double>()) {
      for (int batch_idx = 0; batch_idx < static_cast<int>(params.batch); ++batch_idx) {
        sum += sum_of_sequence(kernel_params, batch_idx, head, sink);
      }
    }
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < 2 * half) primitives::store_shared(sums + thread, sum);
      primitives::sync_threads();  // both halves are stored
      if (thread < half) sum += primitives::load_shared(sums + thread + half);
      primitives::sync_threads();  // they are read: the next round overwrites them
    }
    if (thread == 0) store_sum(kernel_params.bwd, head, sum);
  }

  static SA_DEVICE double sum_of_sequence(const Params& kernel_params, int batch_idx, int head,
                                          double sink) {
    const attention::FlashFwdParams& params = kernel_params.bwd.fwd;
    const attention::SeqlenInfo info = attention::seqlen_info(params, batch_idx);
    const Real* lse = static_cast<const Real*>(params.lse) +
                      info.q_batch * params.lse_stride_batch + head * params.lse_stride_head +
                      info.q_row;
    const Real* delta =
        kernel_params.delta + head * params.total_q + info.q_batch * params.seqlen_q + info.q_row;
    double sum = 0;
    for (int64_t i = primitives::thread_idx(); i < info.seqlen_q; i += kThreads) {
      const double row_lse = static_cast<double>(primitives::load_global(lse + i));
      // They are equal where both are +inf, and for a row without visible keys.
      const double p_sink = row_lse == sink ? 1.0 : std::exp(sink - row_lse);
      sum -= p_sink * static_cast<double>(primitives::load_global(delta + i));
    }
    return sum;
  }

  static SA_DEVICE void store_sum(const attention::FlashBwdParams& params, int head, double sum) {
    switch (params.fwd.s_aux_dtype) {
      case attention::DataType::kFloat64:
        return store_as<double>(params.ds_aux, head, sum);
      case attention::DataType::kFloat32:
        return store_as<float>(params.ds_aux, head, sum);
      case attention::DataType::kFloat16:
        return store_as<attention::Float16>(params.ds_aux, head, sum);
      default:
        return store_as<attention::BFloat16>(params.ds_aux, head, sum);
    }
  }
  template <class Element>
  static SA_DEVICE void store_as(void* base, int idx, double value) {
    primitives::store_global(static_cast<Element*>(base) + idx, from_real<Element>(value));
  }
};

}  // namespace sink_attention::cuda::simt
