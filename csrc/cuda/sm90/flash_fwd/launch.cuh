// Starts the forward kernel of one head_dim class.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/sm90/flash_fwd/kernel.cuh"
#include "cuda/sm90/tensor_maps.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm90 {

template <class Tiles, class Storage>
void make_maps(FlashFwdKernelProblem& kernel_problem) {
  const attention::FlashFwdProblem& problem = kernel_problem.problem;
  const MapPlan q = plan_packed_rows(problem, problem.q, problem.q_stride_batch,
                                     problem.q_stride_row, problem.q_stride_head, problem.head_dim,
                                     Storage::QTile::kSlabCols, Tiles::kBlockM);
  kernel_problem.q_in_boxes = rows_are_boxes(problem, Tiles::kBlockM) && q.is_possible();
  if (kernel_problem.q_in_boxes) kernel_problem.q_map = q.encode();

  kernel_problem.group = static_cast<int>(problem.num_heads_q / problem.num_heads_kv);

  const bool paged = problem.block_table != nullptr;
  kernel_problem.box_rows =
      paged ? rows_of_box(problem.page_size, Tiles::kBlockN & -Tiles::kBlockN) : Tiles::kBlockN;
  const bool long_enough = kernel_problem.box_rows >= kMinBoxRows;
  const MapPlan k = plan_keys(problem, false, Storage::KTile::kSlabCols, kernel_problem.box_rows);
  const MapPlan v =
      plan_keys(problem, true, Storage::LoadedVTile::kSlabCols, kernel_problem.box_rows);
  kernel_problem.k_in_boxes = long_enough && k.is_possible();
  kernel_problem.v_in_boxes = long_enough && v.is_possible();
  if (kernel_problem.k_in_boxes) kernel_problem.k_map = k.encode();
  if (kernel_problem.v_in_boxes) kernel_problem.v_map = v.encode();
}

// How many sequences' kv heads are worked on at one time: all tiles of rows read their keys and
// values again, which shall come from L2. It has 50 MB, of which half is left for q and out.
inline int section_of(const attention::FlashFwdProblem& problem) {
  constexpr int64_t kBytes = 24 << 20;
  const int64_t heads = problem.batch * problem.num_heads_kv;
  const int64_t head_bytes = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v);
  if (head_bytes * heads <= kBytes) return static_cast<int>(heads);
  return static_cast<int>(kBytes / head_bytes > 1 ? kBytes / head_bytes : 1);
}

// kernel_problem holds the problem, out_cols and the descales.
template <class Element, class Tiles>
void launch_tiles(FlashFwdKernelProblem kernel_problem, int num_sms, Stream stream) {
  const attention::FlashFwdProblem& problem = kernel_problem.problem;
  kernel_problem.scale = score_scale(problem);
  kernel_problem.out_in_chunks =
      rows_are_chunks(problem.out, kernel_problem.out_cols, problem.out_stride_batch,
                      problem.out_stride_row, problem.out_stride_head);
  make_maps<Tiles, FlashFwdStorage<Element, Tiles>>(kernel_problem);
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  kernel_problem.num_tiles = static_cast<int>((rows + Tiles::kBlockM - 1) / Tiles::kBlockM);
  const int64_t works = kernel_problem.num_tiles * problem.batch * problem.num_heads_kv;
  if (works > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  kernel_problem.num_works = static_cast<int>(works);
  kernel_problem.section = section_of(problem);
  const int blocks = num_sms < kernel_problem.num_works ? num_sms : kernel_problem.num_works;
  primitives::launch<FlashFwdKernel<Element, Tiles>>(kernel_problem, {blocks, 1, 1}, stream);
}

// Bfloat16 or float16.
template <int kHeadDim, int kHeadDimV>
void launch_flash_fwd(const attention::FlashFwdProblem& problem, int num_sms, Stream stream) {
  using Tiles = FlashFwdTilesOf<kHeadDim, kHeadDimV>;
  FlashFwdKernelProblem kernel_problem{};
  kernel_problem.problem = problem;
  kernel_problem.out_cols = static_cast<int>(problem.head_dim_v);
  if (problem.dtype == attention::DataType::kBFloat16) {
    launch_tiles<attention::BFloat16, Tiles>(kernel_problem, num_sms, stream);
  } else {
    launch_tiles<attention::Float16, Tiles>(kernel_problem, num_sms, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
