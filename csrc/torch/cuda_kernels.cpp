#include "torch/cuda_kernels.h"

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
  check(false, source, " must be sm80, sm90 or empty (the best for a problem), got '", name, "'");
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

attention::FlashFwdProblem describe_problem(const std::string& dtype, const std::string& kv_dtype,
                                            int64_t seqlen_q, int64_t num_heads_q,
                                            int64_t num_heads_kv, int64_t head_dim,
                                            int64_t head_dim_v, bool paged, int64_t num_splits,
                                            bool tree_mask) {
  static const int32_t block_table = 0;  // never read: only whether there is one counts
  static const int64_t tree = 0;
  static const float scale = 1;
  attention::FlashFwdProblem problem{};
  problem.dtype = data_type(dtype);
  problem.kv_dtype = data_type(kv_dtype);
  problem.s_aux_dtype = DataType::kFloat32;
  const bool quantised =
      problem.kv_dtype == DataType::kInt8 || problem.kv_dtype == DataType::kFloat8E4M3;
  if (quantised) problem.k_scale = problem.v_scale = &scale;
  problem.batch = 1;
  problem.seqlen_q = problem.total_q = seqlen_q;
  problem.seqlen_k = 4096;
  problem.num_heads_q = num_heads_q;
  problem.num_heads_kv = num_heads_kv;
  problem.head_dim = head_dim;
  problem.head_dim_v = head_dim_v;
  problem.q_stride_head = problem.k_stride_head = head_dim;
  problem.v_stride_head = problem.out_stride_head = head_dim_v;
  problem.q_stride_row = num_heads_q * head_dim;
  problem.k_stride_row = num_heads_kv * head_dim;
  problem.v_stride_row = num_heads_kv * head_dim_v;
  problem.out_stride_row = num_heads_q * head_dim_v;
  problem.softmax_scale = 1;
  problem.window_left = problem.window_right = -1;
  if (paged) {
    problem.block_table = &block_table;
    problem.page_size = 16;
    problem.k_stride_batch = problem.page_size * problem.k_stride_row;
    problem.v_stride_batch = problem.page_size * problem.v_stride_row;
    problem.num_splits = num_splits;
  } else {
    problem.total_k = problem.seqlen_k;
  }
  if (tree_mask) problem.tree_mask = &tree;
  return problem;
}

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&cuda_kernels));
  m.impl("set_cuda_kernels", TORCH_BOX(&set_cuda_kernels));
}

}  // namespace sink_attention::binding
