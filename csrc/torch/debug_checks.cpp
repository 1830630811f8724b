#include "torch/debug_checks.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

using attention::FlashFwdProblem;
using attention::ReshapeAndCacheProblem;

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
template <class Problem>
void copy_scales(OnHost<Problem>& host, const std::optional<Tensor>& k_scale,
                 const std::optional<Tensor>& v_scale) {
  if (host.problem.k_scale != nullptr) host.problem.k_scale = copy<float>(*k_scale, host.copies);
  if (host.problem.v_scale != nullptr) host.problem.v_scale = copy<float>(*v_scale, host.copies);
}

}  // namespace

bool debug_checks() { return is_on; }

OnHost<FlashFwdProblem> on_host(const FlashFwdProblem& problem, const VarlenArgs& varlen) {
  OnHost<FlashFwdProblem> host{problem, {}};
  host.problem.cu_seqlens_q = copy<int32_t>(varlen.cu_seqlens_q, host.copies);
  host.problem.cu_seqlens_k = copy<int32_t>(varlen.cu_seqlens_k, host.copies);
  if (varlen.seqused_k) {
    host.problem.seqused_k = copy<int32_t>(*varlen.seqused_k, host.copies);
  }
  return host;
}

OnHost<FlashFwdProblem> on_host(const FlashFwdProblem& problem, const PagedArgs& paged) {
  OnHost<FlashFwdProblem> host{problem, {}};
  host.problem.block_table = copy<int32_t>(paged.block_table, host.copies);
  host.problem.block_table_stride = paged.block_table.size(1);
  host.problem.seqused_k = copy<int32_t>(paged.seqused_k, host.copies);
  if (paged.cu_seqlens_q) {
    host.problem.cu_seqlens_q = copy<int32_t>(*paged.cu_seqlens_q, host.copies);
  }
  copy_scales(host, paged.k_scale, paged.v_scale);
  if (paged.tree_mask && paged.tree_mask->numel() > 0) {
    const Tensor& tree_mask = *paged.tree_mask;
    host.problem.tree_mask = copy<int64_t>(tree_mask, host.copies);
    host.problem.tree_mask_stride = tree_mask.dim() == 2 ? tree_mask.size(1) : 0;
  }
  return host;
}

OnHost<ReshapeAndCacheProblem> on_host(const ReshapeAndCacheProblem& problem,
                                       const CacheArgs& args) {
  OnHost<ReshapeAndCacheProblem> host{problem, {}};
  host.problem.slot_mapping = copy<int64_t>(args.slot_mapping, host.copies);
  copy_scales(host, args.k_scale, args.v_scale);
  return host;
}

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("debug_checks", TORCH_BOX(&debug_checks));
  m.impl("set_debug_checks", TORCH_BOX(&set_debug_checks));
}

}  // namespace sink_attention::binding
