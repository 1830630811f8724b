#include "torch/kernel_family.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>

#include "torch/checks.h"
#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

using cuda::Family;

constexpr const char* kVariable = "SINK_ATTENTION_CUDA_KERNELS";

std::optional<Family> parse(const std::string& name, const char* source) {
  if (name.empty()) return {};
  if (name == "sm80") return Family::kSm80;
  if (name == "sm90") return Family::kSm90;
  check(false, source, " must be sm80, sm90 or empty (the best for a params), got '", name, "'");
  return {};
}

std::atomic<std::optional<Family>>& forced() {
  static std::atomic<std::optional<Family>> family = [] {
    const char* name = std::getenv(kVariable);
    return parse(name != nullptr ? name : "", kVariable);
  }();
  return family;
}

std::string cuda_kernels() {
  const std::optional<Family> family = forced_cuda_family();
  if (!family) return "";
  return family == Family::kSm90 ? "sm90" : "sm80";
}

void set_cuda_kernels(const std::string& name) { forced() = parse(name, "set_cuda_kernels: name"); }

DataType data_type(const std::string& name) {
  if (name == "float64") return DataType::kFloat64;
  if (name == "float32") return DataType::kFloat32;
  if (name == "float16") return DataType::kFloat16;
  if (name == "bfloat16") return DataType::kBFloat16;
  if (name == "int8") return DataType::kInt8;
  check(name == "float8_e4m3fn", "there are no kernels for ", name);
  return DataType::kFloat8E4M3;
}

}  // namespace

std::optional<Family> forced_cuda_family() { return forced(); }

attention::FlashFwdParams describe_params(const std::string& dtype, const std::string& kv_dtype,
                                          int64_t seqlen_q, int64_t num_heads_q,
                                          int64_t num_heads_kv, int64_t head_dim,
                                          int64_t head_dim_v, bool paged, int64_t num_splits,
                                          bool tree_mask) {
  static const int32_t block_table = 0;  // never read: only whether there is one counts
  static const int64_t tree = 0;
  static const float scale = 1;
  attention::FlashFwdParams params{};
  params.dtype = data_type(dtype);
  params.kv_dtype = data_type(kv_dtype);
  params.s_aux_dtype = DataType::kFloat32;
  const bool quantised =
      params.kv_dtype == DataType::kInt8 || params.kv_dtype == DataType::kFloat8E4M3;
  if (quantised) params.k_scale = params.v_scale = &scale;
  params.batch = 1;
  params.seqlen_q = params.total_q = seqlen_q;
  params.seqlen_k = 4096;
  params.num_heads_q = num_heads_q;
  params.num_heads_kv = num_heads_kv;
  params.head_dim = head_dim;
  params.head_dim_v = head_dim_v;
  params.q_stride_head = params.k_stride_head = head_dim;
  params.v_stride_head = params.out_stride_head = head_dim_v;
  params.q_stride_row = num_heads_q * head_dim;
  params.k_stride_row = num_heads_kv * head_dim;
  params.v_stride_row = num_heads_kv * head_dim_v;
  params.out_stride_row = num_heads_q * head_dim_v;
  params.softmax_scale = 1;
  params.window_left = params.window_right = -1;
  if (paged) {
    params.block_table = &block_table;
    params.page_size = 16;
    params.k_stride_batch = params.page_size * params.k_stride_row;
    params.v_stride_batch = params.page_size * params.v_stride_row;
    params.num_splits = num_splits;
  } else {
    params.total_k = params.seqlen_k;
  }
  if (tree_mask) params.tree_mask = &tree;
  return params;
}

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&cuda_kernels));
  m.impl("set_cuda_kernels", TORCH_BOX(&set_cuda_kernels));
}

}  // namespace sink_attention::binding
