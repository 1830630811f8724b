// Chooses a decode kernel for a problem, makes its tensor maps, and starts it.
#pragma once

#include "cuda/kernels/combine.h"
#include "cuda/sm90/decode/entry.h"
#include "cuda/sm90/decode/kernel.cuh"
#include "cuda/sm90/decode/params.h"
#include "cuda/sm90/tensor_maps.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm90 {

template <class Kernel>
void launch_kernel(const DecodeKernelParams& without_maps, Stream stream) {
  using Tiles = typename Kernel::Tiles;
  DecodeKernelParams kernel_params = without_maps;
  const attention::FlashFwdParams& params = kernel_params.attn;
  const int box_rows = rows_of_box(params.page_size, Tiles::kBlockN);
  constexpr int kBytes = Tiles::kStoredBytes;
  const MapPlan keys =
      plan_keys(params, false, Kernel::Storage::KTile::kSlabBytes / kBytes, box_rows);
  const MapPlan values =
      plan_keys(params, true, Kernel::Storage::VTile::kSlabBytes / kBytes, box_rows);
  if (box_rows >= kMinBoxRows && keys.is_possible() && values.is_possible()) {
    kernel_params.box_rows = box_rows;
    kernel_params.k_map = keys.encode();
    kernel_params.v_map = values.encode();
  }
  const primitives::Index3 grid{static_cast<int>(params.batch),
                                static_cast<int>(params.num_heads_kv) * kernel_params.num_splits,
                                1};
  primitives::launch<Kernel>(kernel_params, grid, stream);
}

template <class Element, class Stored, int kHeadDim, int kHeadDimV>
void launch_rows(const FlashFwdCall& call, const DecodeKernelParams& kernel_params) {
  constexpr int kBytes = static_cast<int>(sizeof(Stored));
  if (call.plan.shape.pack_gqa_rows() <= kFewRows) {
    launch_kernel<DecodeKernel<Element, Stored, FewRows<kHeadDim, kHeadDimV, kBytes>>>(
        kernel_params, call.stream);
  } else {
    launch_kernel<DecodeKernel<Element, Stored, ManyRows<kHeadDim, kHeadDimV, kBytes>>>(
        kernel_params, call.stream);
  }
}

// One head-dim bucket.
template <int kHeadDim, int kHeadDimV>
void launch_decode(const FlashFwdCall& call) {
  using attention::BFloat16;
  using attention::DataType;
  using attention::Float16;
  const attention::FlashFwdParams& params = call.params;
  const Partials partials = partials_in(call.workspace, call.plan.shape, call.plan.num_splits);
  DecodeKernelParams kernel_params{};
  kernel_params.attn = params;
  kernel_params.scale = score_scale(params);
  kernel_params.q_is_vectorised = rows_are_vectorised(
      params.q, params.head_dim, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
  kernel_params.num_splits = call.plan.num_splits;
  kernel_params.partial_state = partials.state;
  kernel_params.partial_out = partials.out;
  if (params.kv_dtype == DataType::kFloat8E4M3) {
    launch_rows<Float16, attention::Float8E4M3, kHeadDim, kHeadDimV>(call, kernel_params);
  } else if (params.kv_dtype == DataType::kInt8) {
    launch_rows<Float16, attention::Int8, kHeadDim, kHeadDimV>(call, kernel_params);
  } else if (params.dtype == DataType::kBFloat16) {
    launch_rows<BFloat16, BFloat16, kHeadDim, kHeadDimV>(call, kernel_params);
  } else {
    launch_rows<Float16, Float16, kHeadDim, kHeadDimV>(call, kernel_params);
  }
  if (kernel_params.num_splits > 1) {
    combine(params, call.plan.shape, kernel_params.num_splits, partials, call.stream);
  }
}

}  // namespace sink_attention::cuda::sm90
