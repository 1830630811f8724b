// Starts the backward's kernels of one head-dim bucket.
#pragma once

#include "cuda/device/score_scale.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/sm90/flash_bwd/kernel.cuh"
#include "cuda/sm90/flash_bwd/params.h"
#include "cuda/sm90/tensor_maps.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm90 {

inline void set_map(const MapPlan& plan, bool wanted, bool& has_map, primitives::TensorMap& map) {
  has_map = wanted && plan.is_possible();
  if (has_map) map = plan.encode();
}

// The boxes of K and V are blocks, those of Q and dO the used rows of tiles.
template <class Tiles>
void set_maps(FlashBwdKernelParams& params) {
  const attention::FlashBwdParams& bwd = params.bwd;
  const attention::FlashFwdParams& fwd = bwd.fwd;
  constexpr int kSlabCols = Tiles::slab_cols(Tiles::kHeadDim);
  constexpr int kSlabColsV = Tiles::slab_cols(Tiles::kHeadDimV);
  set_map(plan_keys(fwd, false, kSlabCols, Tiles::kBlockN), true, params.has_k_map, params.k_map);
  set_map(plan_keys(fwd, true, kSlabColsV, Tiles::kBlockN), true, params.has_v_map, params.v_map);
  const bool boxes = rows_are_boxes(fwd, params.workspace.used_rows);
  set_map(plan_pack_gqa(fwd, fwd.q, fwd.q_stride_batch, fwd.q_stride_row, fwd.q_stride_head,
                        fwd.head_dim, kSlabCols, Tiles::kBlockM),
          boxes, params.has_q_map, params.q_map);
  set_map(plan_pack_gqa(fwd, bwd.dout, bwd.dout_stride_batch, bwd.dout_stride_row,
                        bwd.dout_stride_head, fwd.head_dim_v, kSlabColsV, Tiles::kBlockM),
          boxes, params.has_dout_map, params.dout_map);
}

template <int kHeadDim, int kHeadDimV>
void launch_key_blocks(FlashBwdKernelParams& params, Stream stream) {
  using Tiles = FlashBwdTilesOf<kHeadDim, kHeadDimV>;
  const attention::FlashFwdParams& fwd = params.bwd.fwd;
  params.order = bwd_block_order(fwd, Tiles::kBlockN);
  const primitives::Index3 grid{params.order.num_blocks(), 1, 1};
  if (grid.x == 0) return;
  set_maps<Tiles>(params);
  if (fwd.dtype == attention::DataType::kBFloat16) {
    primitives::launch<FlashBwdKernel<attention::BFloat16, Tiles>>(params, grid, stream);
  } else {
    primitives::launch<FlashBwdKernel<attention::Float16, Tiles>>(params, grid, stream);
  }
}

// Bfloat16 or float16.
template <int kHeadDim, int kHeadDimV>
void launch_flash_bwd(const FlashBwdCall& call) {
  using Tiles = FlashBwdTilesOf<kHeadDim, kHeadDimV>;
  const attention::FlashFwdParams& fwd = call.params.fwd;
  FlashBwdKernelParams kernel_params{};
  kernel_params.bwd = call.params;
  lay_out(call.plan.shape, Tiles::kBlockM, rows_of_whole_positions(call.plan.shape, Tiles::kBlockM),
          kHeadDim, call.workspace, kernel_params.workspace);
  kernel_params.qhead_per_khead = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  set_bwd_score_scale(fwd, kernel_params);
  bwd_preprocess(call.params, kernel_params.workspace, call.stream);
  launch_key_blocks<kHeadDim, kHeadDimV>(kernel_params, call.stream);
  bwd_postprocess(call.params, kernel_params.workspace, call.stream);
}

}  // namespace sink_attention::cuda::sm90
