// Starts the forward kernel of one head-dim bucket.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/sm90/flash_fwd/kernel.cuh"
#include "cuda/sm90/tensor_maps.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm90 {

template <class Tiles, class Storage>
void make_maps(FlashFwdKernelParams& kernel_params) {
  const attention::FlashFwdParams& params = kernel_params.attn;
  const MapPlan q = plan_pack_gqa(params, params.q, params.q_stride_batch, params.q_stride_row,
                                  params.q_stride_head, params.head_dim, Storage::QTile::kSlabCols,
                                  Tiles::kBlockM);
  kernel_params.q_uses_tma = rows_are_boxes(params, Tiles::kBlockM) && q.is_possible();
  if (kernel_params.q_uses_tma) kernel_params.q_map = q.encode();

  kernel_params.qhead_per_khead = static_cast<int>(params.num_heads_q / params.num_heads_kv);

  const bool paged = params.block_table != nullptr;
  kernel_params.box_rows =
      paged ? rows_of_box(params.page_size, Tiles::kBlockN & -Tiles::kBlockN) : Tiles::kBlockN;
  const bool long_enough = kernel_params.box_rows >= kMinBoxRows;
  const MapPlan k = plan_keys(params, false, Storage::KTile::kSlabCols, kernel_params.box_rows);
  const MapPlan v =
      plan_keys(params, true, Storage::LoadedVTile::kSlabCols, kernel_params.box_rows);
  kernel_params.k_uses_tma = long_enough && k.is_possible();
  kernel_params.v_uses_tma = long_enough && v.is_possible();
  if (kernel_params.k_uses_tma) kernel_params.k_map = k.encode();
  if (kernel_params.v_uses_tma) kernel_params.v_map = v.encode();
}

// How many sequences' kv heads are worked on at one time: all tiles of rows read their keys and
// values again, which shall come from L2. It has 50 MB, of which half is left for q and out.
inline int section_of(const attention::FlashFwdParams& params) {
  constexpr int64_t kBytes = 24 << 20;
  const int64_t heads = params.batch * params.num_heads_kv;
  const int64_t head_bytes = 2 * params.seqlen_k * (params.head_dim + params.head_dim_v);
  if (head_bytes * heads <= kBytes) return static_cast<int>(heads);
  return static_cast<int>(kBytes / head_bytes > 1 ? kBytes / head_bytes : 1);
}

// kernel_params holds the problem, out_cols and the descales.
template <class Element, class Tiles>
void launch_tiles(FlashFwdKernelParams kernel_params, int num_sms, Stream stream) {
  const attention::FlashFwdParams& params = kernel_params.attn;
  kernel_params.scale = score_scale(params);
  kernel_params.out_is_vectorised =
      rows_are_vectorised(params.out, kernel_params.out_cols, params.out_stride_batch,
                          params.out_stride_row, params.out_stride_head);
  make_maps<Tiles, FlashFwdStorage<Element, Tiles>>(kernel_params);
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  kernel_params.num_tiles = static_cast<int>((rows + Tiles::kBlockM - 1) / Tiles::kBlockM);
  const int64_t work_tiles = kernel_params.num_tiles * params.batch * params.num_heads_kv;
  if (work_tiles > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  kernel_params.num_work_tiles = static_cast<int>(work_tiles);
  kernel_params.section = section_of(params);
  const int blocks =
      num_sms < kernel_params.num_work_tiles ? num_sms : kernel_params.num_work_tiles;
  primitives::launch<FlashFwdKernel<Element, Tiles>>(kernel_params, {blocks, 1, 1}, stream);
}

// Bfloat16 or float16.
template <int kHeadDim, int kHeadDimV>
void launch_flash_fwd(const attention::FlashFwdParams& params, int num_sms, Stream stream) {
  using Tiles = FlashFwdTilesOf<kHeadDim, kHeadDimV>;
  FlashFwdKernelParams kernel_params{};
  kernel_params.attn = params;
  kernel_params.out_cols = static_cast<int>(params.head_dim_v);
  if (params.dtype == attention::DataType::kBFloat16) {
    launch_tiles<attention::BFloat16, Tiles>(kernel_params, num_sms, stream);
  } else {
    launch_tiles<attention::Float16, Tiles>(kernel_params, num_sms, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
