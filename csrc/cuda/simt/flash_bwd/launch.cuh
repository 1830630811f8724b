// Starts the backward's kernels in float32 or float64, after each other. The two of the products
// both compute the scores, so that no element has two writers.
#pragma once

#include "cuda/simt/entry.h"
#include "cuda/simt/flash_bwd/dk_dv_kernel.cuh"
#include "cuda/simt/flash_bwd/dq_kernel.cuh"
#include "cuda/simt/flash_bwd/rows_kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::simt {

template <class Tiles>
void launch_flash_bwd(const FlashBwdCall& call) {
  using Real = typename Tiles::Real;
  const CallShape& shape = call.plan.shape;
  Real* const delta = static_cast<Real*>(call.workspace);

  const int64_t rows = shape.pack_gqa_rows();
  const int64_t delta_tiles = divide_up(rows, FlashBwdDeltaKernel<Real>::kBlockM);
  const FlashBwdRowsParams<Real> rows_params{call.params, delta, static_cast<int>(delta_tiles)};
  primitives::launch<FlashBwdDeltaKernel<Real>>(rows_params, {blocks_of(shape, delta_tiles), 1, 1},
                                                call.stream);
  if (call.params.ds_aux != nullptr) {
    primitives::launch<FlashBwdSinkKernel<Real>>(
        rows_params, {static_cast<int>(shape.num_heads_q), 1, 1}, call.stream);
  }

  const int64_t dq_tiles = divide_up(rows, Tiles::kBlockM);
  primitives::launch<FlashBwdDqKernel<Tiles>>({call.params, delta, static_cast<int>(dq_tiles)},
                                              {blocks_of(shape, dq_tiles), 1, 1}, call.stream);
  const int64_t key_tiles = divide_up(shape.seqlen_k, Tiles::kBlockM);
  primitives::launch<FlashBwdDkDvKernel<Tiles>>({call.params, delta, static_cast<int>(key_tiles)},
                                                {blocks_of(shape, key_tiles), 1, 1}, call.stream);
}

}  // namespace sink_attention::cuda::simt
