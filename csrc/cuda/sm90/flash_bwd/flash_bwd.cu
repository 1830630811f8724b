// Hopper's backward: which kernel and tiles, and what workspace.
#include <algorithm>

#include "attention/online_softmax.h"
#include "cuda/kernels/bwd_workspace.h"
#include "cuda/sm90/flash_bwd/config.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/sm90/flash_bwd/params.h"
#include "cuda/sm90/tensor_maps.h"

namespace sink_attention::cuda::sm90 {
namespace {

using attention::FlashBwdParams;
using attention::FlashFwdParams;

// A head-dim bucket: how a query tile is cut, and the kernel.
struct HeadDimBucket {
  int tile_rows;
  int head_dim;
  void (*run)(const FlashBwdKernelParams& params, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimBucket make_bucket(void (*run)(const FlashBwdKernelParams&, Stream)) {
  return {FlashBwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, kHeadDim, run};
}

HeadDimBucket bucket_of(const FlashFwdParams& params) {
  const int64_t dim = params.head_dim;
  const int64_t dim_v = params.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 64) return make_bucket<64, 64>(flash_bwd_hdim64);
  if (larger <= 96) return make_bucket<96, 96>(flash_bwd_hdim96);
  if (larger <= 128) return make_bucket<128, 128>(flash_bwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_bucket<192, 128>(flash_bwd_hdim192_128);
  if (larger <= 192) return make_bucket<192, 192>(flash_bwd_hdim192);
  return make_bucket<256, 256>(flash_bwd_hdim256);
}

int64_t lay_out_workspace(const FlashBwdParams& params, const HeadDimBucket& chosen, void* memory,
                          BwdWorkspace& workspace) {
  return lay_out(params, chosen.tile_rows, rows_of_whole_positions(params.fwd, chosen.tile_rows),
                 chosen.head_dim, memory, workspace);
}

}  // namespace

int64_t flash_bwd_workspace_bytes(const FlashBwdParams& params) {
  BwdWorkspace workspace{};
  return lay_out_workspace(params, bucket_of(params.fwd), nullptr, workspace);
}

void flash_bwd(const FlashBwdParams& params, const Device&, void* memory, Stream stream) {
  const FlashFwdParams& fwd = params.fwd;
  const HeadDimBucket chosen = bucket_of(fwd);
  FlashBwdKernelParams kernel_params{};
  kernel_params.bwd = params;
  lay_out_workspace(params, chosen, memory, kernel_params.workspace);
  kernel_params.qhead_per_khead = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  kernel_params.has_softcap = fwd.softcap > 0;
  const double to_logit = kernel_params.has_softcap ? fwd.softcap : fwd.softmax_scale;
  kernel_params.softmax_scale_log2 = static_cast<float>(to_logit * attention::kLog2E);
  kernel_params.to_tanh =
      kernel_params.has_softcap ? static_cast<float>(fwd.softmax_scale / fwd.softcap) : 0.0f;
  bwd_preprocess(params, kernel_params.workspace, stream);
  chosen.run(kernel_params, stream);
  bwd_postprocess(params, kernel_params.workspace, stream);
}

}  // namespace sink_attention::cuda::sm90
