// Chooses a decode kernel for a problem, makes its tensor maps, and starts it.
#pragma once

#include "cuda/sm90/paged_attn/kernel.cuh"
#include "cuda/sm90/paged_attn/launch.h"
#include "cuda/sm90/tensor_maps.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm90 {

template <class Kernel>
void launch_kernel(const DecodeKernelProblem& without_maps, Stream stream) {
  using Tiles = typename Kernel::Tiles;
  DecodeKernelProblem kernel_problem = without_maps;
  const attention::FlashFwdProblem& problem = kernel_problem.problem;
  const int box_rows = rows_of_box(problem.page_size, Tiles::kBlockN);
  constexpr int kBytes = Tiles::kStoredBytes;
  const MapPlan keys =
      plan_keys(problem, false, Kernel::Storage::KTile::kSlabBytes / kBytes, box_rows);
  const MapPlan values =
      plan_keys(problem, true, Kernel::Storage::VTile::kSlabBytes / kBytes, box_rows);
  if (box_rows >= kMinBoxRows && keys.is_possible() && values.is_possible()) {
    kernel_problem.box_rows = box_rows;
    kernel_problem.k_map = keys.encode();
    kernel_problem.v_map = values.encode();
  }
  const primitives::Index3 grid{static_cast<int>(problem.batch),
                                static_cast<int>(problem.num_heads_kv) * kernel_problem.num_splits,
                                1};
  primitives::launch<Kernel>(kernel_problem, grid, stream);
}

template <class Element, class Stored, int kHeadDim, int kHeadDimV>
void launch_rows(const DecodeKernelProblem& kernel_problem, Stream stream) {
  constexpr int kBytes = static_cast<int>(sizeof(Stored));
  if (packed_rows_of(kernel_problem.problem) <= kFewRows) {
    launch_kernel<DecodeKernel<Element, Stored, FewRows<kHeadDim, kHeadDimV, kBytes>>>(
        kernel_problem, stream);
  } else {
    launch_kernel<DecodeKernel<Element, Stored, ManyRows<kHeadDim, kHeadDimV, kBytes>>>(
        kernel_problem, stream);
  }
}

// One head_dim class.
template <int kHeadDim, int kHeadDimV>
void launch_decode(const DecodeKernelProblem& kernel_problem, Stream stream) {
  using attention::BFloat16;
  using attention::DataType;
  using attention::Float16;
  const attention::FlashFwdProblem& problem = kernel_problem.problem;
  if (problem.kv_dtype == DataType::kFloat8E4M3) {
    launch_rows<Float16, attention::Float8E4M3, kHeadDim, kHeadDimV>(kernel_problem, stream);
  } else if (problem.kv_dtype == DataType::kInt8) {
    launch_rows<Float16, attention::Int8, kHeadDim, kHeadDimV>(kernel_problem, stream);
  } else if (problem.dtype == DataType::kBFloat16) {
    launch_rows<BFloat16, BFloat16, kHeadDim, kHeadDimV>(kernel_problem, stream);
  } else {
    launch_rows<Float16, Float16, kHeadDim, kHeadDimV>(kernel_problem, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
