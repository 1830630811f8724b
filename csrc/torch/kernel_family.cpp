#include "torch/kernel_family.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>

#include "torch/checks.h"
#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

constexpr const char* kVariable = "SINK_ATTENTION_CUDA_KERNELS";

const char* parse(const std::string& name, const char* source) {
  const char* family = cuda::forceable_family(name);
  check(name.empty() || family != nullptr, source,
        " must be sm80, sm90 or empty (the best that take a call), got '", name, "'");
  return family;
}

std::atomic<const char*>& forced() {
  static std::atomic<const char*> family = [] {
    const char* name = std::getenv(kVariable);
    return parse(name != nullptr ? name : "", kVariable);
  }();
  return family;
}

std::string cuda_kernels() {
  const char* family = forced_cuda_family();
  return family != nullptr ? family : "";
}

void set_cuda_kernels(const std::string& name) { forced() = parse(name, "set_cuda_kernels: name"); }

DataType data_type(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() == ScalarType::Float8_e4m3fn) return DataType::kFloat8E4M3;
  if (tensor.scalar_type() == ScalarType::Char) return DataType::kInt8;
  return float_type(tensor, name);
}

cuda::RowLayout layout_of(const Tensor& tensor) {
  return {true, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_attention_shape(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* tensor : {&q, &k, &v}) {
    check(tensor->dim() == 4 && (tensor->size(3) <= 1 || tensor->stride(3) == 1),
          "q, k and v must have shape (batch, seqlen, num_heads, head_dim) and a last stride of 1");
  }
  check(k.size(2) > 0 && k.size(2) == v.size(2) && q.size(2) % k.size(2) == 0,
        "num_heads of k and v must be equal and divide q's, got ", q.size(2), ", ", k.size(2),
        " and ", v.size(2));
  check(q.size(3) == k.size(3), "head_dim of q and k must be equal, got ", q.size(3), " and ",
        k.size(3));
}

}  // namespace

const char* forced_cuda_family() { return forced(); }

const char*& build_archs() {
  static const char* archs = cuda::kBuildArchs;
  return archs;
}

namespace {

// The op: the name of the kernel that runs a call on such tensors on a card of compute capability
// arch / 10.arch % 10, "sm90::decode_hdim64"; throws std::runtime_error with the reasons where none
// does. Of float8 q, k and v "" says that the caller must dequantise them.
//
// q: (batch, seqlen_q, num_heads_q, head_dim); k, v: (batch, seqlen_k, num_heads_kv, head_dim or
// head_dim_v), or (num_pages, page_size, ...) where paged. Of these only shapes, strides and dtypes
// are looked at, so they may be on any device, "meta" too; the data count as aligned.
std::string cuda_plan(const Tensor& q, const Tensor& k, const Tensor& v, bool paged, bool tree_mask,
                      int64_t num_splits, bool backward, int64_t arch) {
  const cuda::Device device{1, static_cast<int>(arch), forced_cuda_family(), build_archs()};
  check_attention_shape(q, k, v);
  cuda::CallShape shape{};
  shape.dtype = data_type(q, "q");
  shape.kv_dtype = data_type(k, "k");
  shape.is_paged = paged;
  shape.has_tree_mask = tree_mask;
  shape.batch = q.size(0);
  shape.seqlen_q = q.size(1);
  shape.seqlen_k = paged ? k.size(0) * k.size(1) : k.size(1);
  shape.total_q = q.size(0) * q.size(1);
  shape.total_k = paged ? 0 : k.size(0) * k.size(1);
  shape.num_heads_q = q.size(2);
  shape.num_heads_kv = k.size(2);
  shape.head_dim = q.size(3);
  shape.head_dim_v = v.size(3);
  shape.page_size = paged ? k.size(1) : 0;
  shape.num_pages = paged ? k.size(0) : 0;
  shape.num_splits = num_splits;
  shape.q = layout_of(q);
  shape.k = shape.dk = layout_of(k);
  shape.v = shape.dv = layout_of(v);
  shape.out =
      shape.dout = {true, q.size(1) * q.size(2) * v.size(3), q.size(2) * v.size(3), v.size(3)};
  if (shape.dtype == DataType::kFloat8E4M3) {
    check(!backward && !paged, "float8 q, k and v are for the dense and varlen forward only");
    return cuda::plan_flash_fwd_fp8(shape, device).kernel_name();
  }
  return backward ? cuda::plan_flash_bwd(shape, device).kernel_name()
                  : cuda::plan_flash_fwd(shape, device).kernel_name();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&cuda_kernels));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("set_cuda_kernels", TORCH_BOX(&set_cuda_kernels));
}

}  // namespace sink_attention::binding
