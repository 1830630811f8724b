// P and dS of a query row and a key, for both kernels of the backward:
//
//   P = exp(S - lse)     dS = P (dP - delta)     dP = dO V^T     delta = <dO, O> - dlse
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/device/score_scale.h"
#include "cuda/simt/scores.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::simt {

template <class Real>
struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  const Real* delta;  // [num_heads_q][total_q]
  int num_tiles;      // tiles of rows (dq) or keys (dk, dv) of the longest sequence
};

// What the backward needs of a query row.
template <class Real>
struct RowStats {
  KeyRange window;
  Real lse_log2;
  Real delta;
};

// RowStats of a tile, in shared memory. A structure of arrays: neighbouring rows are in
// neighbouring banks.
template <class Real, int kRows>
struct RowStatsTable {
  KeyRange window[kRows];
  Real lse_log2[kRows];
  Real delta[kRows];

  SA_DEVICE RowStats<Real> load(int row) const {
    return {primitives::load_shared(&window[row]), primitives::load_shared(&lse_log2[row]),
            primitives::load_shared(&delta[row])};
  }

  // Thread t < kRows writes row first_row + t. For a row beyond the last all keys are masked.
  SA_DEVICE void fill(const FlashBwdKernelParams<Real>& kernel_params, const attention::Mask& mask,
                      const PackGqa& rows, int first_row) {
    const int i = primitives::thread_idx();
    if (i >= kRows) return;
    const attention::FlashFwdParams& params = kernel_params.bwd.fwd;
    const int row = first_row + i;
    // lse_log2 = +inf gives P = exp2(S - inf) = 0. It is used beyond the last row, and for rows
    // without visible keys, whose lse without a sink is -inf.
    Real row_lse_log2 = static_cast<Real>(INFINITY);
    Real row_delta = Real(0);
    if (row < rows.num_rows) {
      const Real lse = primitives::load_global(
          static_cast<const Real*>(params.lse) +
          rows.lse_offset(row, params.lse_stride_batch, params.lse_stride_head));
      if (lse != attention::negative_infinity<Real>()) {
        row_lse_log2 = lse * static_cast<Real>(attention::kLog2E);
      }
      row_delta = primitives::load_global(kernel_params.delta +
                                          rows.lse_offset(row, params.seqlen_q, params.total_q));
    }
    primitives::store_shared(&window[i], window_keys(mask, rows, row));
    primitives::store_shared(&lse_log2[i], row_lse_log2);
    primitives::store_shared(&delta[i], row_delta);
  }
};

// In place score -> P and dP -> dS, without the factor softmax_scale. Both are 0 for a masked key.
template <class Real>
SA_DEVICE void differentiate(Real& score, Real& dp, const ScoreScaleOf<Real>& scale,
                             const RowStats<Real>& row, int key, int num_sink_tokens) {
  const Real transformed = transform(scale, score);
  const Real exponent = transformed * scale.softmax_scale_log2 - row.lse_log2;
  const Real p = std::exp2(clamp_exponent(exponent));
  const bool visible = row.window.contains(key, num_sink_tokens);
  score = visible ? p : Real(0);
  dp = visible ? p * (dp - row.delta) * slope(scale, transformed) : Real(0);
}

}  // namespace sink_attention::cuda::simt
