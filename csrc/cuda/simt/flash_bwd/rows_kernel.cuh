// The backward's row-wise part in float32 or float64, before its products:
//
//   delta  = <dout, out> - dlse                          FlashBwdDeltaKernel
//   ds_aux = sum over rows of exp(s_aux - lse) * -delta  FlashBwdSinkKernel
#pragma once

#include <cmath>

#include "cuda/simt/scores.cuh"
#include "cuda/tile/number.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "primitives/cta.h"
#include "primitives/memory.h"

namespace sink_attention::cuda::simt {

template <class Real>
struct FlashBwdRowsProblem {
  attention::FlashBwdProblem problem;
  Real* delta;    // [num_heads_q][total_q]
  int num_tiles;  // of rows, of the longest sequence
};

// One block a tile of 64 packed rows; the 16 lanes of a row take its numbers in turns.
template <class Real>
struct FlashBwdDeltaKernel {
  using Problem = FlashBwdRowsProblem<Real>;
  static constexpr int kBlockM = 64;
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
  };

  static SA_DEVICE void run(const Problem& kernel_problem, char*) {
    const attention::FlashBwdProblem& bwd = kernel_problem.problem;
    const attention::FlashFwdProblem& problem = bwd.fwd;
    const BlockPlace place = place_of_block(problem, kernel_problem.num_tiles);
    const PackedRows rows = packed_rows(problem, place.batch_idx, place.kv_head);
    const int row_begin = place.tile * kBlockM;
    if (row_begin >= rows.num_rows) return;
    // All lanes go round together, as the compiler sees: they come to shuffles.
    for (int pass = 0; pass < kBlockM; pass += kThreadRows) {
      const int row = row_begin + pass + thread_y();
      const bool exists = row < rows.num_rows;
      Real sum = Real(0);
      if (exists) {
        const Real* out = static_cast<const Real*>(problem.out) +
                          rows.offset(row, problem.out_stride_batch, problem.out_stride_row,
                                      problem.out_stride_head);
        const Real* dout =
            static_cast<const Real*>(bwd.dout) +
            rows.offset(row, bwd.dout_stride_batch, bwd.dout_stride_row, bwd.dout_stride_head);
        for (int d = thread_x(); d < static_cast<int>(problem.head_dim_v); d += kThreadCols) {
          sum += primitives::load_global(out + d) * primitives::load_global(dout + d);
        }
      }
      sum = sum_over_row(sum);  // all lanes take part, whatever their row
      if (!exists || thread_x() != 0) continue;
      if (bwd.dlse != nullptr) {
        sum -= primitives::load_global(
            static_cast<const Real*>(bwd.dlse) +
            rows.offset(row, bwd.dlse_stride_batch, bwd.dlse_stride_row, bwd.dlse_stride_head));
      }
      primitives::store_global(
          kernel_problem.delta + rows.lse_offset(row, problem.seqlen_q, problem.total_q), sum);
    }
  }
};

// One block a query head. Thread t sums rows t, t + 128, ... of each sequence; then halves of the
// threads are folded onto each other: the order is fixed.
template <class Real>
struct FlashBwdSinkKernel {
  using Problem = FlashBwdRowsProblem<Real>;
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * sizeof(double);
  };

  static SA_DEVICE void run(const Problem& kernel_problem, char* shared) {
    const attention::FlashFwdProblem& problem = kernel_problem.problem.fwd;
    double* sums = reinterpret_cast<double*>(shared);
    const int head = primitives::block_idx().x;
    const int thread = primitives::thread_idx();
    // In the precision that the forward reads it in, so that a row without keys has a weight of 1.
    const double sink =
        static_cast<double>(load_number<Real>(problem.s_aux, problem.s_aux_dtype, head));
    double sum = 0;
    if (sink != attention::negative_infinity<double>()) {
      for (int batch_idx = 0; batch_idx < static_cast<int>(problem.batch); ++batch_idx) {
        sum += sum_of_sequence(kernel_problem, batch_idx, head, sink);
      }
    }
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < 2 * half) primitives::store_shared(sums + thread, sum);
      primitives::sync_threads();  // both halves are there
      if (thread < half) sum += primitives::load_shared(sums + thread + half);
      primitives::sync_threads();  // and read: the next round overwrites them
    }
    if (thread == 0) store_sum(kernel_problem.problem, head, sum);
  }

  static SA_DEVICE double sum_of_sequence(const Problem& kernel_problem, int batch_idx, int head,
                                          double sink) {
    const attention::FlashFwdProblem& problem = kernel_problem.problem.fwd;
    const attention::SeqlenInfo info = attention::seqlen_info(problem, batch_idx);
    const Real* lse = static_cast<const Real*>(problem.lse) +
                      info.q_batch * problem.lse_stride_batch + head * problem.lse_stride_head +
                      info.q_row;
    const Real* delta = kernel_problem.delta + head * problem.total_q +
                        info.q_batch * problem.seqlen_q + info.q_row;
    double sum = 0;
    for (int64_t i = primitives::thread_idx(); i < info.seqlen_q; i += kThreads) {
      const double row_lse = static_cast<double>(primitives::load_global(lse + i));
      // Equal where both are +inf, and where the row has no key.
      const double weight = row_lse == sink ? 1.0 : std::exp(sink - row_lse);
      sum -= weight * static_cast<double>(primitives::load_global(delta + i));
    }
    return sum;
  }

  static SA_DEVICE void store_sum(const attention::FlashBwdProblem& problem, int head, double sum) {
    switch (problem.fwd.s_aux_dtype) {
      case attention::DataType::kFloat64:
        return store_as<double>(problem.ds_aux, head, sum);
      case attention::DataType::kFloat32:
        return store_as<float>(problem.ds_aux, head, sum);
      case attention::DataType::kFloat16:
        return store_as<attention::Float16>(problem.ds_aux, head, sum);
      default:
        return store_as<attention::BFloat16>(problem.ds_aux, head, sum);
    }
  }
  template <class Element>
  static SA_DEVICE void store_as(void* base, int idx, double value) {
    primitives::store_global(static_cast<Element*>(base) + idx, from_real<Element>(value));
  }
};

}  // namespace sink_attention::cuda::simt
