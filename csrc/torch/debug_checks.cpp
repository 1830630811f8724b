#include "torch/debug_checks.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

using attention::FlashFwdParams;
using attention::ReshapeAndCacheParams;

std::atomic<bool> is_on{false};

void set_debug_checks(bool on) { is_on = on; }

// Copies, of CPU tensors too: the emulator's tensors are the device's to the kernels.
template <class T>
const T* copy(const Tensor& tensor, std::vector<Tensor>& copies) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  copies.push_back(torch::stable::contiguous(
      torch::stable::to(tensor, host, /*non_blocking=*/false, /*copy=*/true)));
  return copies.back().const_data_ptr<T>();
}

// But for those of single tokens, which the checks don't read.
template <class Params>
void copy_scales(OnHost<Params>& host, const std::optional<Tensor>& k_scale,
                 const std::optional<Tensor>& v_scale) {
  if (host.params.k_scale != nullptr) host.params.k_scale = copy<float>(*k_scale, host.copies);
  if (host.params.v_scale != nullptr) host.params.v_scale = copy<float>(*v_scale, host.copies);
}

}  // namespace

bool debug_checks() { return is_on; }

OnHost<FlashFwdParams> on_host(const FlashFwdParams& params, const VarlenArgs& varlen) {
  OnHost<FlashFwdParams> host{params, {}};
  host.params.cu_seqlens_q = copy<int32_t>(varlen.cu_seqlens_q, host.copies);
  host.params.cu_seqlens_k = copy<int32_t>(varlen.cu_seqlens_k, host.copies);
  if (varlen.seqused_k) {
    host.params.seqused_k = copy<int32_t>(*varlen.seqused_k, host.copies);
  }
  return host;
}

OnHost<FlashFwdParams> on_host(const FlashFwdParams& params, const PagedArgs& paged) {
  OnHost<FlashFwdParams> host{params, {}};
  if (paged.block_table) {
    host.params.block_table = copy<int32_t>(*paged.block_table, host.copies);
    host.params.block_table_stride = paged.block_table->size(1);
  } else {
    host.params.block_table = nullptr;  // every page exists
  }
  host.params.seqused_k = copy<int32_t>(paged.cache_seqlens, host.copies);
  if (paged.cu_seqlens_q) {
    host.params.cu_seqlens_q = copy<int32_t>(*paged.cu_seqlens_q, host.copies);
  }
  copy_scales(host, paged.k_scale, paged.v_scale);
  if (paged.tree_mask && paged.tree_mask->numel() > 0) {
    const Tensor& tree_mask = *paged.tree_mask;
    host.params.tree_mask = copy<int64_t>(tree_mask, host.copies);
    host.params.tree_mask_stride = tree_mask.dim() == 2 ? tree_mask.size(1) : 0;
  }
  return host;
}

OnHost<ReshapeAndCacheParams> on_host(const ReshapeAndCacheParams& params, const CacheArgs& args) {
  OnHost<ReshapeAndCacheParams> host{params, {}};
  host.params.slot_mapping = copy<int64_t>(args.slot_mapping, host.copies);
  copy_scales(host, args.k_scale, args.v_scale);
  return host;
}

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("debug_checks", TORCH_BOX(&debug_checks));
  m.impl("set_debug_checks", TORCH_BOX(&set_debug_checks));
}

}  // namespace sink_attention::binding
