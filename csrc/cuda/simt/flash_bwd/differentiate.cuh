// What both kernels of the backward compute for each pair of a query row and a key:
//
//   P = exp(S - lse)     dS = P (dP - delta)     dP = dO V^T     delta = <dO, O> - dlse
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/scores.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::simt {

template <class Real>
struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  const Real* delta;  // [num_heads_q][total_q]
  int num_tiles;      // of rows (dq) or keys (dk, dv), of the longest sequence
};

// What the backward knows of a query row.
template <class Real>
struct RowFacts {
  KeyRange window;
  Real lse_log2;
  Real delta;
};

// In shared memory, as arrays, so that neighbouring rows lie in neighbouring banks.
template <class Real, int kRows>
struct RowFactsTable {
  KeyRange window[kRows];
  Real lse_log2[kRows];
  Real delta[kRows];

  SA_DEVICE RowFacts<Real> load(int row) const {
    return {primitives::load_shared(&window[row]), primitives::load_shared(&lse_log2[row]),
            primitives::load_shared(&delta[row])};
  }

  // Thread t < kRows fills in row first_row + t. A row beyond the last sees nothing.
  SA_DEVICE void fill(const FlashBwdKernelParams<Real>& kernel_params, const attention::Mask& mask,
                      const PackGqa& rows, int first_row) {
    const int i = primitives::thread_idx();
    if (i >= kRows) return;
    const attention::FlashFwdParams& params = kernel_params.bwd.fwd;
    const int row = first_row + i;
    // exp2(S - inf) is 0: what a row without keys, whose lse without a sink is -inf, has to have.
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

// A score becomes the weight P, and dP becomes dS, but for the softmax scale.
template <class Real>
SA_DEVICE void differentiate(Real& score, Real& dp, const ScoreScale<Real>& scale,
                             const RowFacts<Real>& row, int key, int num_sink_tokens) {
  const Real transformed = scale.transform(score);
  // No weight exceeds 1. Where logits are so large that lse's rounding is a power of two or more,
  // this keeps the gradients finite; a NaN passes.
  const Real exponent = transformed * scale.softmax_scale_log2 - row.lse_log2;
  const Real weight = std::exp2(exponent > Real(0) ? Real(0) : exponent);
  const bool visible = row.window.sees(key, num_sink_tokens);
  score = visible ? weight : Real(0);
  dp = visible ? weight * (dp - row.delta) * scale.slope(transformed) : Real(0);
}

}  // namespace sink_attention::cuda::simt
