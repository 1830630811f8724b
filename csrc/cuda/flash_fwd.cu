// The forward's entry: which kernel family and tiles, how many splits, what workspace.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/bounded.h"
#include "cuda/device/block_order.h"
#include "cuda/family.h"
#include "cuda/kernels/combine.h"
#include "cuda/kernels/splits.h"
#include "cuda/simt/backend.h"
#include "cuda/sm80/flash_fwd/config.h"
#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm90/decode/entry.h"
#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::FlashFwdParams;

constexpr int kMinSplitKeys = 256;  // fewer keys a split are not worth the merge

int64_t qhead_per_khead_of(const FlashFwdParams& params) {
  return params.num_heads_q / params.num_heads_kv;
}

bool has_tensor_core_kernels(const FlashFwdParams& params) {
  return params.dtype == DataType::kBFloat16 || params.dtype == DataType::kFloat16;
}

// Decode tiles are for caches, and divide a row's sums among warps. With num_splits = 1, and in
// dense and varlen calls, all rows go through prefill tiles: a row's sums then have one order,
// whatever the rows and the lengths beside it.
bool is_sm80_decode(const FlashFwdParams& params) {
  return params.block_table != nullptr && params.num_splits != 1 &&
         params.seqlen_q * qhead_per_khead_of(params) <= sm80::kDecodeRows;
}

// Parts of the keys, so that there is a block for each multiprocessor. Lengths in device memory are
// not known here: the longest that there can be counts.
int choose_splits(const FlashFwdParams& params, const Device& device) {
  if (params.num_splits > 0) return limit_splits(params, params.num_splits);
  if (!is_sm80_decode(params)) return 1;
  const int64_t blocks = std::max<int64_t>(params.batch * params.num_heads_kv, 1);
  const int64_t wanted = 2 * device.num_sms / blocks;
  return limit_splits(params, std::min(wanted, most_keys(params) / kMinSplitKeys));
}

struct Plan {
  Family family;
  bool decode;     // tiles for few rows over a cache
  int num_splits;  // parts of each row's keys, joined at the end; sm90's decode has its own
};

// Which kernels run a problem. On Hopper sm90's do where they take it: the decode over a cache, or
// the prefill where the caller lets the keys stay in one part.
Plan make_plan(const FlashFwdParams& params, const Device& device) {
  Plan plan{Family::kSimt, false, 1};
  if (has_tensor_core_kernels(params)) {
    plan = {Family::kSm80, is_sm80_decode(params), choose_splits(params, device)};
  }
  const char* why_not = why_not_sm90(device);
  if (why_not == nullptr) {
    why_not = sm90::why_not_decode(params);
    if (why_not == nullptr) return {Family::kSm90, true, 1};
    if (!plan.decode) {
      why_not = sm90::why_not_flash_fwd(params);
      if (why_not == nullptr && params.num_splits > 1) {
        why_not = "num_splits is above 1, and these are too many rows to decode";
      }
      if (why_not == nullptr) return {Family::kSm90, false, 1};
    }
  }
  must_not_be_forced(device, "forward", why_not);
  return plan;
}

// ---- sm80 ----

// A head-dim bucket: rows of a prefill tile, and the kernels.
struct HeadDimBucket {
  int prefill_rows;
  void (*run)(const sm80::FlashFwdKernelParams& params, bool decode, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimBucket make_bucket(void (*run)(const sm80::FlashFwdKernelParams&, bool, Stream)) {
  static_assert(sm80::Decode<kHeadDim, kHeadDimV>::kBlockM == sm80::kDecodeRows);
  return {sm80::Prefill<kHeadDim, kHeadDimV>::kBlockM, run};
}

HeadDimBucket bucket_of(const FlashFwdParams& params) {
  const int64_t dim = params.head_dim;
  const int64_t dim_v = params.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) return make_bucket<32, 32>(sm80::flash_fwd_hdim32);
  if (larger <= 64) return make_bucket<64, 64>(sm80::flash_fwd_hdim64);
  if (larger <= 96) return make_bucket<96, 96>(sm80::flash_fwd_hdim96);
  if (larger <= 128) return make_bucket<128, 128>(sm80::flash_fwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_bucket<192, 128>(sm80::flash_fwd_hdim192_128);
  if (larger <= 192) return make_bucket<192, 192>(sm80::flash_fwd_hdim192);
  return make_bucket<256, 256>(sm80::flash_fwd_hdim256);
}

int64_t sm80_workspace_bytes(const FlashFwdParams& params, const Plan& plan) {
  fwd_block_order(params, plan.decode ? sm80::kDecodeRows : bucket_of(params).prefill_rows);
  if (plan.num_splits > 1) check_combine(params, plan.num_splits);
  return partials_bytes(params, plan.num_splits);
}

void run_sm80(const FlashFwdParams& params, const Plan& plan, void* workspace, Stream stream) {
  sm80::FlashFwdKernelParams kernel_params{};
  kernel_params.attn = params;
  kernel_params.scale = score_scale(params);
  kernel_params.q_is_vectorised = rows_are_vectorised(
      params.q, params.head_dim, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
  kernel_params.k_is_vectorised = rows_are_vectorised(
      params.k, params.head_dim, params.k_stride_batch, params.k_stride_row, params.k_stride_head);
  kernel_params.v_is_vectorised =
      rows_are_vectorised(params.v, params.head_dim_v, params.v_stride_batch, params.v_stride_row,
                          params.v_stride_head);
  kernel_params.out_is_vectorised =
      rows_are_vectorised(params.out, params.head_dim_v, params.out_stride_batch,
                          params.out_stride_row, params.out_stride_head);
  kernel_params.num_splits = plan.num_splits;
  const Partials partials = partials_in(workspace, params, plan.num_splits);
  kernel_params.partial_state = partials.state;
  kernel_params.partial_out = partials.out;
  bucket_of(params).run(kernel_params, plan.decode, stream);
  if (plan.num_splits > 1) {
    combine(params, plan.num_splits, partials, stream);
  }
}

// ---- sm90: a build without these kernels does not refer to them ----

int64_t sm90_workspace_bytes([[maybe_unused]] const FlashFwdParams& params,
                             [[maybe_unused]] const Plan& plan,
                             [[maybe_unused]] const Device& device) {
  if constexpr (kHasSm90) {
    if (plan.decode) return sm90::decode_workspace_bytes(params, device);
    sm90::check_flash_fwd(params);
  }
  return 0;
}

void run_sm90([[maybe_unused]] const FlashFwdParams& params, [[maybe_unused]] const Plan& plan,
              [[maybe_unused]] const Device& device, [[maybe_unused]] void* workspace,
              [[maybe_unused]] Stream stream) {
  if constexpr (kHasSm90) {
    plan.decode ? sm90::decode(params, device, workspace, stream)
                : sm90::flash_fwd(params, device, stream);
  }
}

}  // namespace

Family flash_fwd_family(const FlashFwdParams& params, const Device& device) {
  return make_plan(params, device).family;
}

int64_t flash_fwd_workspace_bytes(const FlashFwdParams& given, const Device& device) {
  const FlashFwdParams params = bounded(given);
  const Plan plan = make_plan(params, device);
  switch (plan.family) {
    case Family::kSimt:
      params.dtype == DataType::kFloat32 ? check_flash_fwd_float32(params)
                                         : check_flash_fwd_float64(params);
      return 0;
    case Family::kSm80:
      return sm80_workspace_bytes(params, plan);
    case Family::kSm90:
      return sm90_workspace_bytes(params, plan, device);
  }
  return 0;
}

void flash_fwd(const FlashFwdParams& given, const Device& device, void* workspace, Stream stream) {
  if (given.batch == 0 || given.seqlen_q == 0 || given.num_heads_q == 0) return;
  const FlashFwdParams params = bounded(given);
  const Plan plan = make_plan(params, device);
  switch (plan.family) {
    case Family::kSimt:
      return params.dtype == DataType::kFloat32 ? flash_fwd_float32(params, stream)
                                                : flash_fwd_float64(params, stream);
    case Family::kSm80:
      return run_sm80(params, plan, workspace, stream);
    case Family::kSm90:
      return run_sm90(params, plan, device, workspace, stream);
  }
}

}  // namespace sink_attention::cuda
