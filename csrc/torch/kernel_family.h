// Whose CUDA kernels run: what the environment or set_cuda_kernels forces, and the answer for a
// problem that is described, not yet there.
#pragma once

#include <optional>
#include <string>

#include "cuda/backend.h"
#include "torch/checks.h"

namespace sink_attention::binding {

// SINK_ATTENTION_CUDA_KERNELS or set_cuda_kernels, for all threads and devices; of a device's
// `forced`.
std::optional<cuda::Family> forced_cuda_family();

// An attention problem on contiguous tensors, as far as the choice of kernels looks at it. With
// seqlen_q query positions a sequence; num_splits counts where paged.
attention::FlashFwdParams describe_params(const std::string& dtype, const std::string& kv_dtype,
                                          int64_t seqlen_q, int64_t num_heads_q,
                                          int64_t num_heads_kv, int64_t head_dim,
                                          int64_t head_dim_v, bool paged, int64_t num_splits,
                                          bool tree_mask);

// The op cuda_kernel_family, where a library has the kernels: "simt", "sm80" or "sm90" for `arch`,
// "sm90-float8" for float8 q, k and v that are not dequantised before,
// 10 * major + minor of a compute capability. Throws what the call would.
inline std::string cuda_kernel_family(const std::string& dtype, const std::string& kv_dtype,
                                      int64_t seqlen_q, int64_t num_heads_q, int64_t num_heads_kv,
                                      int64_t head_dim, int64_t head_dim_v, bool paged,
                                      int64_t num_splits, bool tree_mask, bool backward,
                                      int64_t arch) {
  const attention::FlashFwdParams fwd =
      describe_params(dtype, kv_dtype, seqlen_q, num_heads_q, num_heads_kv, head_dim, head_dim_v,
                      paged, num_splits, tree_mask);
  const cuda::Device device{1, static_cast<int>(arch), forced_cuda_family()};
  if (fwd.dtype == DataType::kFloat8E4M3) {
    check(!backward && !paged, "float8 q, k and v are for the dense and varlen forward only");
    if (cuda::takes_flash_fwd_fp8({fwd, {}, {}, {}}, device)) {
      return "sm90-float8";
    }
    return cuda_kernel_family("bfloat16", "bfloat16", seqlen_q, num_heads_q, num_heads_kv, head_dim,
                              head_dim_v, paged, num_splits, tree_mask, backward, arch);
  }
  if (!backward) return cuda::family_name(cuda::flash_fwd_family(fwd, device));
  attention::FlashBwdParams bwd{};
  bwd.fwd = fwd;
  bwd.dout_stride_head = bwd.dv_stride_head = head_dim_v;
  bwd.dq_stride_head = bwd.dk_stride_head = head_dim;
  bwd.dout_stride_row = num_heads_q * head_dim_v;
  bwd.dq_stride_row = num_heads_q * head_dim;
  bwd.dk_stride_row = num_heads_kv * head_dim;
  bwd.dv_stride_row = num_heads_kv * head_dim_v;
  return cuda::family_name(cuda::flash_bwd_family(bwd, device));
}

}  // namespace sink_attention::binding
