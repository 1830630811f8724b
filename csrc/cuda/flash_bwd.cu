// The backward's entry: which kernel and tiles, and what workspace.
#include <algorithm>

#include "attention/online_softmax.h"
#include "cuda/backend.h"
#include "cuda/bounded.h"
#include "cuda/family.h"
#include "cuda/kernels/bwd_workspace.h"
#include "cuda/simt/backend.h"
#include "cuda/sm80/flash_bwd/config.h"
#include "cuda/sm80/flash_bwd/params.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::FlashBwdParams;
using attention::FlashFwdParams;

// A head-dim bucket: how a query tile is cut, and the kernel.
struct HeadDimBucket {
  int tile_rows;
  int head_dim;
  void (*run)(const sm80::FlashBwdKernelParams& params, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimBucket make_bucket(void (*run)(const sm80::FlashBwdKernelParams&, Stream)) {
  return {sm80::FlashBwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, kHeadDim, run};
}

HeadDimBucket bucket_of(const FlashFwdParams& params) {
  const int64_t dim = params.head_dim;
  const int64_t dim_v = params.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) return make_bucket<32, 32>(sm80::flash_bwd_hdim32);
  if (larger <= 64) return make_bucket<64, 64>(sm80::flash_bwd_hdim64);
  if (larger <= 96) return make_bucket<96, 96>(sm80::flash_bwd_hdim96);
  if (larger <= 128) return make_bucket<128, 128>(sm80::flash_bwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_bucket<192, 128>(sm80::flash_bwd_hdim192_128);
  if (larger <= 192) return make_bucket<192, 192>(sm80::flash_bwd_hdim192);
  return make_bucket<256, 256>(sm80::flash_bwd_hdim256);
}

void set_score_scale(const FlashFwdParams& params, sm80::FlashBwdKernelParams& kernel_params) {
  kernel_params.has_softcap = params.softcap > 0;
  const double scale = params.softmax_scale;
  kernel_params.to_tanh =
      kernel_params.has_softcap ? static_cast<float>(scale / params.softcap) : 0.0f;
  kernel_params.softmax_scale_log2 =
      static_cast<float>((kernel_params.has_softcap ? params.softcap : scale) * attention::kLog2E);
}

void set_vectorised(const FlashBwdParams& bwd, sm80::FlashBwdKernelParams& kernel_params) {
  const FlashFwdParams& fwd = bwd.fwd;
  kernel_params.q_is_vectorised = rows_are_vectorised(fwd.q, fwd.head_dim, fwd.q_stride_batch,
                                                      fwd.q_stride_row, fwd.q_stride_head);
  kernel_params.k_is_vectorised = rows_are_vectorised(fwd.k, fwd.head_dim, fwd.k_stride_batch,
                                                      fwd.k_stride_row, fwd.k_stride_head);
  kernel_params.v_is_vectorised = rows_are_vectorised(fwd.v, fwd.head_dim_v, fwd.v_stride_batch,
                                                      fwd.v_stride_row, fwd.v_stride_head);
  kernel_params.dout_is_vectorised = rows_are_vectorised(
      bwd.dout, fwd.head_dim_v, bwd.dout_stride_batch, bwd.dout_stride_row, bwd.dout_stride_head);
  kernel_params.dk_is_vectorised = rows_are_vectorised(bwd.dk, fwd.head_dim, bwd.dk_stride_batch,
                                                       bwd.dk_stride_row, bwd.dk_stride_head);
  kernel_params.dv_is_vectorised = rows_are_vectorised(bwd.dv, fwd.head_dim_v, bwd.dv_stride_batch,
                                                       bwd.dv_stride_row, bwd.dv_stride_head);
}

// Which kernels run a problem: on Hopper sm90's, where they take it.
Family choose_family(const FlashBwdParams& params, const Device& device) {
  const char* why_not = why_not_sm90(device);
  if (why_not == nullptr) why_not = sm90::why_not_flash_bwd(params);
  if (why_not == nullptr) return Family::kSm90;
  must_not_be_forced(device, "backward", why_not);
  const DataType dtype = params.fwd.dtype;
  const bool tensor_cores = dtype == DataType::kBFloat16 || dtype == DataType::kFloat16;
  return tensor_cores ? Family::kSm80 : Family::kSimt;
}

void run_simt(const FlashBwdParams& params, void* memory, Stream stream) {
  if (params.fwd.dtype == DataType::kFloat32) {
    flash_bwd_rows_float32(params, static_cast<float*>(memory), stream);
    flash_bwd_float32(params, static_cast<float*>(memory), stream);
  } else {
    flash_bwd_rows_float64(params, static_cast<double*>(memory), stream);
    flash_bwd_float64(params, static_cast<double*>(memory), stream);
  }
}

void run_sm80(const FlashBwdParams& params, void* memory, Stream stream) {
  const FlashFwdParams& fwd = params.fwd;
  const HeadDimBucket chosen = bucket_of(fwd);
  sm80::FlashBwdKernelParams kernel_params{};
  kernel_params.bwd = params;
  lay_out(params, chosen.tile_rows, chosen.tile_rows, chosen.head_dim, memory,
          kernel_params.workspace);
  kernel_params.qhead_per_khead = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  set_score_scale(fwd, kernel_params);
  set_vectorised(params, kernel_params);
  bwd_preprocess(params, kernel_params.workspace, stream);
  chosen.run(kernel_params, stream);
  bwd_postprocess(params, kernel_params.workspace, stream);
}

}  // namespace

Family flash_bwd_family(const FlashBwdParams& params, const Device& device) {
  return choose_family(params, device);
}

int64_t flash_bwd_workspace_bytes(const FlashBwdParams& given, const Device& device) {
  FlashBwdParams params = given;
  params.fwd = bounded(given.fwd);
  const FlashFwdParams& fwd = params.fwd;
  switch (choose_family(params, device)) {
    case Family::kSimt: {
      const size_t number = fwd.dtype == DataType::kFloat32 ? sizeof(float) : sizeof(double);
      return fwd.total_q * fwd.num_heads_q * static_cast<int64_t>(number);
    }
    case Family::kSm80: {
      const HeadDimBucket chosen = bucket_of(fwd);
      BwdWorkspace workspace{};
      return lay_out(params, chosen.tile_rows, chosen.tile_rows, chosen.head_dim, nullptr,
                     workspace);
    }
    case Family::kSm90:  // a build without these kernels does not refer to them
      if constexpr (kHasSm90) return sm90::flash_bwd_workspace_bytes(params);
  }
  return 0;
}

void flash_bwd(const FlashBwdParams& given, const Device& device, void* memory, Stream stream) {
  if (given.fwd.num_heads_q == 0) return;
  FlashBwdParams params = given;
  params.fwd = bounded(given.fwd);
  switch (choose_family(params, device)) {
    case Family::kSimt:
      return run_simt(params, memory, stream);
    case Family::kSm80:
      return run_sm80(params, memory, stream);
    case Family::kSm90:
      if constexpr (kHasSm90) sm90::flash_bwd(params, device, memory, stream);
  }
}

}  // namespace sink_attention::cuda
