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
