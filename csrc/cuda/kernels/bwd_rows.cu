#include "cuda/kernels/bwd_rows.cuh"
#include "cuda/kernels/bwd_workspace.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::BFloat16;
using attention::DataType;
using attention::FlashBwdParams;
using attention::FlashFwdParams;
using attention::Float16;

constexpr int64_t kAlignment = 256;

// Bump allocator over `memory`. With null memory it returns null and only counts bytes.
class BumpAllocator {
 public:
  explicit BumpAllocator(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

BwdRowsParams rows_params(const FlashBwdParams& params, const BwdWorkspace& workspace) {
  const FlashFwdParams& fwd = params.fwd;
  BwdRowsParams rows{};
  rows.bwd = params;
  rows.workspace = workspace;
  rows.out_is_vectorised = rows_are_vectorised(fwd.out, fwd.head_dim_v, fwd.out_stride_batch,
                                               fwd.out_stride_row, fwd.out_stride_head);
  rows.dout_is_vectorised =
      rows_are_vectorised(params.dout, fwd.head_dim_v, params.dout_stride_batch,
                          params.dout_stride_row, params.dout_stride_head);
  rows.dq_is_vectorised = rows_are_vectorised(params.dq, fwd.head_dim, params.dq_stride_batch,
                                              params.dq_stride_row, params.dq_stride_head);
  return rows;
}

primitives::Index3 tiles_of(const FlashBwdParams& params, const BwdWorkspace& workspace) {
  return {workspace.num_tiles, static_cast<int>(params.fwd.num_heads_kv), 1};
}

}  // namespace

int64_t lay_out(const FlashBwdParams& params, int tile_rows, int used_rows, int dq_cols,
                void* memory, BwdWorkspace& workspace) {
  const FlashFwdParams& fwd = params.fwd;
  const int64_t qhead_per_khead = fwd.num_heads_q / fwd.num_heads_kv;
  const int64_t num_tiles = fwd.total_q * qhead_per_khead / used_rows + fwd.batch;
  const int64_t all_tiles = num_tiles * fwd.num_heads_kv;
  BumpAllocator allocator(memory);
  workspace.tile_rows = tile_rows;
  workspace.used_rows = used_rows;
  workspace.dq_cols = dq_cols;
  workspace.num_tiles = static_cast<int>(num_tiles);
  workspace.lse_log2 = allocator.take<float>(all_tiles * tile_rows);
  workspace.delta = allocator.take<float>(all_tiles * tile_rows);
  workspace.dq = allocator.take<float>(all_tiles * tile_rows * dq_cols);
  workspace.sink_terms =
      fwd.s_aux == nullptr ? nullptr : allocator.take<float>(num_tiles * fwd.num_heads_q);
  workspace.dq_semaphores = params.deterministic ? allocator.take<int>(all_tiles) : nullptr;
  workspace.first_tiles = fwd.cu_seqlens_q == nullptr ? nullptr : allocator.take<int>(fwd.batch);
  return allocator.used();
}

void bwd_preprocess(const FlashBwdParams& params, const BwdWorkspace& workspace, void* stream) {
  const BwdRowsParams rows = rows_params(params, workspace);
  const primitives::Index3 tiles = tiles_of(params, workspace);
  if (params.fwd.cu_seqlens_q != nullptr) {
    primitives::launch<BwdFirstTiles>(rows, {1, 1, 1}, stream);
  }
  if (params.fwd.dtype == DataType::kBFloat16) {
    primitives::launch<BwdPreprocess<BFloat16>>(rows, tiles, stream);
  } else {
    primitives::launch<BwdPreprocess<Float16>>(rows, tiles, stream);
  }
  if (params.fwd.s_aux != nullptr) {
    const primitives::Index3 heads{static_cast<int>(params.fwd.num_heads_q), 1, 1};
    primitives::launch<BwdSinkGradient>(rows, heads, stream);
  }
}

void bwd_postprocess(const FlashBwdParams& params, const BwdWorkspace& workspace, void* stream) {
  const BwdRowsParams rows = rows_params(params, workspace);
  const primitives::Index3 tiles = tiles_of(params, workspace);
  if (params.fwd.dtype == DataType::kBFloat16) {
    primitives::launch<BwdPostprocess<BFloat16>>(rows, tiles, stream);
  } else {
    primitives::launch<BwdPostprocess<Float16>>(rows, tiles, stream);
  }
}

}  // namespace sink_attention::cuda
