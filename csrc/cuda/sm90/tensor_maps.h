// TMA tensor maps of Q, K and V, made on the host: their dimensions, and which tensors have one.
//
// A TMA box is one slab wide (64 columns, or 32) and some rows high. Maps of K and V have 4
// dimensions:
//
//     (column, key, kv head, sequence)      packed sequences: `key` counts all keys, sequence is 0
//     (column, slot, kv head, page)         with a block table
//
// Maps of PackGQA rows (device/pack_gqa.cuh) have 5 dimensions. A box holds all qhead_per_khead
// heads of each of its positions:
//
//     (column, query head of the kv head, position, kv head, sequence)
#pragma once

#include "attention/paged_kv.h"
#include "attention/params.h"
#include "cuda/tile/copy.cuh"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

using primitives::TensorMap;
using primitives::TensorMapShape;

constexpr int64_t kMaxMapStride = int64_t{1} << 40;
constexpr int64_t kMaxMapSize = int64_t{1} << 31;  // coordinates are ints

// One dimension of a map. A dimension of size 1 has no meaningful stride.
struct MapDim {
  int64_t size;
  int64_t stride;  // elements
  int box;

  bool fits(int element_bytes) const {
    const int64_t bytes = stride * element_bytes;
    return 1 <= size && size < kMaxMapSize &&
           (size == 1 || (0 < bytes && bytes < kMaxMapStride && bytes % 16 == 0));
  }
};

struct MapPlan {
  const void* base;
  int element_bytes;
  int rank;
  MapDim dim[primitives::kMaxTensorRank];
  int slab_cols;

  bool is_possible() const {
    bool fits = reinterpret_cast<uintptr_t>(base) % 16 == 0 && base != nullptr;
    fits = fits && 1 <= dim[0].size && dim[0].size < kMaxMapSize;
    for (int i = 1; i < rank; ++i) fits = fits && dim[i].fits(element_bytes);
    return fits;
  }
  TensorMap encode() const {
    TensorMapShape shape{};
    shape.base = base;
    shape.element_bytes = element_bytes;
    shape.rank = rank;
    for (int i = 0; i < rank; ++i) {
      shape.size[i] = dim[i].size;
      shape.stride_bytes[i] = dim[i].size == 1 ? 16 : dim[i].stride * element_bytes;
      shape.box[i] = dim[i].box;
    }
    const int row_bytes = slab_cols * element_bytes;
    shape.swizzle = row_bytes == 128  ? primitives::Swizzle::k128
                    : row_bytes == 64 ? primitives::Swizzle::k64
                                      : primitives::Swizzle::k32;
    return primitives::encode_tensor_map(shape);
  }
};

// The map of K, or of V where `values`, in TMA boxes of `box_rows` keys. A box never crosses a
// page.
inline MapPlan plan_keys(const attention::FlashFwdParams& params, bool values, int slab_cols,
                         int box_rows) {
  MapPlan plan{};
  plan.base = values ? params.v : params.k;
  plan.element_bytes = static_cast<int>(attention::bytes_of(params.kv_dtype));
  plan.rank = 4;
  plan.slab_cols = slab_cols;
  const int64_t stride_row = values ? params.v_stride_row : params.k_stride_row;
  const int64_t stride_head = values ? params.v_stride_head : params.k_stride_head;
  const int64_t stride_batch = values ? params.v_stride_batch : params.k_stride_batch;
  const bool paged = params.block_table != nullptr;
  const bool packed = params.cu_seqlens_k != nullptr;
  plan.dim[0] = {values ? params.head_dim_v : params.head_dim, 1, slab_cols};
  plan.dim[1] = {paged    ? params.page_size
                 : packed ? params.total_k
                          : params.seqlen_k,
                 stride_row, box_rows};
  plan.dim[2] = {params.num_heads_kv, stride_head, 1};
  plan.dim[3] = {paged ? params.num_pages : packed ? 1 : params.batch, stride_batch, 1};
  return plan;
}

// Keys of a TMA box of a paged cache: the largest power of 2 that divides page_size, at most
// max_rows. TMA is not used below kMinBoxRows, where cp.async by rows is as fast.
inline int rows_of_box(int64_t page_size, int max_rows) {
  int rows = 1;
  while (2 * rows <= max_rows && page_size % (2 * rows) == 0) rows *= 2;
  return rows;
}
constexpr int kMinBoxRows = 16;

// The map of a tensor like q. A box holds the whole positions among a tile's tile_rows PackGQA
// rows.
inline MapPlan plan_pack_gqa(const attention::FlashFwdParams& params, const void* base,
                             int64_t stride_batch, int64_t stride_row, int64_t stride_head,
                             int64_t cols, int slab_cols, int tile_rows) {
  const int64_t qhead_per_khead = params.num_heads_q / params.num_heads_kv;
  const bool packed = params.cu_seqlens_q != nullptr;
  MapPlan plan{};
  plan.base = base;
  plan.element_bytes = 2;
  plan.rank = 5;
  plan.slab_cols = slab_cols;
  plan.dim[0] = {cols, 1, slab_cols};
  plan.dim[1] = {qhead_per_khead, stride_head, static_cast<int>(qhead_per_khead)};
  plan.dim[2] = {packed ? params.total_q : params.seqlen_q, stride_row,
                 static_cast<int>(tile_rows / qhead_per_khead)};
  plan.dim[3] = {params.num_heads_kv, qhead_per_khead * stride_head, 1};
  plan.dim[4] = {packed ? 1 : params.batch, stride_batch, 1};
  return plan;
}
// Whether one TMA box a slab fills a tile of PackGQA rows.
inline bool rows_are_boxes(const attention::FlashFwdParams& params, int tile_rows) {
  return tile_rows % (params.num_heads_q / params.num_heads_kv) == 0;
}
// Of a tile's rows, those to use so that they are one box of each slab even where a group does not
// divide the tile: whole positions. All of them where a quarter would have nothing to do.
inline int rows_of_whole_positions(const attention::FlashFwdParams& params, int tile_rows) {
  const int64_t qhead_per_khead = params.num_heads_q / params.num_heads_kv;
  const int whole = static_cast<int>(tile_rows / qhead_per_khead * qhead_per_khead);
  return 4 * whole >= 3 * tile_rows ? whole : tile_rows;
}

}  // namespace sink_attention::cuda::sm90
