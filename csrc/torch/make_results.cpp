// Where a problem's results go: out and lse of the forward, the gradients of the backward.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch/make_params.h"

namespace sink_attention::binding {

using attention::FlashBwdParams;
using attention::FlashFwdParams;

void set_results(FlashFwdParams& params, const Tensor& q, const Tensor& out, const Tensor& lse) {
  check_dtype(out, "out", out_scalar_type(q));
  check_dtype(lse, "lse", lse_scalar_type(q));
  check_same_device(out, "out", q);
  check_same_device(lse, "lse", q);
  const bool dense = q.dim() == 4;
  if (dense) {
    check_shape(out, "out", {q.size(0), q.size(1), params.num_heads_q, params.head_dim_v});
    check_shape(lse, "lse", {q.size(0), params.num_heads_q, q.size(1)});
  } else {
    check_shape(out, "out", {q.size(0), params.num_heads_q, params.head_dim_v});
    check_shape(lse, "lse", {params.num_heads_q, q.size(0)});
  }
  check_unit_last_stride(out, "out");
  check_unit_last_stride(lse, "lse");
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  params.out_stride_batch = dense ? out.stride(0) : 0;
  params.out_stride_row = out.stride(dense ? 1 : 0);
  params.out_stride_head = out.stride(dense ? 2 : 1);
  params.lse_stride_batch = dense ? lse.stride(0) : 0;
  params.lse_stride_head = lse.stride(dense ? 1 : 0);
}

void set_new_results(FlashFwdParams& params, const Tensor& out, const Tensor& lse) {
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  const bool dense = params.cu_seqlens_q == nullptr;
  const int64_t rows = dense ? params.seqlen_q : params.total_q;
  params.out_stride_head = params.head_dim_v;
  params.out_stride_row = params.num_heads_q * params.head_dim_v;
  params.out_stride_batch = dense ? rows * params.out_stride_row : 0;
  params.lse_stride_head = rows;
  params.lse_stride_batch = dense ? params.num_heads_q * rows : 0;
}

int32_t result_dtype(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat64:
      return aoti_torch_dtype_float64();
    case DataType::kFloat32:
      return aoti_torch_dtype_float32();
    case DataType::kFloat16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_bfloat16();  // of float8 too
  }
}

int32_t lse_dtype(DataType dtype) {
  return dtype == DataType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

FlashBwdParams make_bwd_params(const FlashFwdParams& fwd, const Tensor& q, const Tensor& out,
                               const Tensor& lse, const Tensor& dout,
                               const std::optional<Tensor>& dlse, const Gradients& gradients,
                               bool deterministic) {
  FlashBwdParams params{};
  params.fwd = fwd;
  params.deterministic = deterministic;
  const bool dense = q.dim() == 4;
  const int64_t row = dense ? 1 : 0, head = dense ? 2 : 1;
  check_same_dtype(dout, "dout", q, "q");
  check_same_device(dout, "dout", q);
  check(dout.sizes().equals(out.sizes()), "dout must have the shape of out, ", shape_of(out),
        "; got ", shape_of(dout));
  check_unit_last_stride(dout, "dout");
  params.dout = dout.const_data_ptr();
  params.dout_stride_batch = dense ? dout.stride(0) : 0;
  params.dout_stride_row = dout.stride(row);
  params.dout_stride_head = dout.stride(head);
  if (dlse) {
    check_dtype(*dlse, "dlse", lse_scalar_type(q));
    check_same_device(*dlse, "dlse", q);
    check(dlse->sizes().equals(lse.sizes()), "dlse must have the shape of lse, ", shape_of(lse),
          "; got ", shape_of(*dlse));
    params.dlse = dlse->const_data_ptr();
    params.dlse_stride_batch = dense ? dlse->stride(0) : 0;
    params.dlse_stride_head = dlse->stride(dense ? 1 : 0);
    params.dlse_stride_row = dlse->stride(dense ? 2 : 1);
  }
  params.dq = gradients.dq.mutable_data_ptr();
  params.dk = gradients.dk.mutable_data_ptr();
  params.dv = gradients.dv.mutable_data_ptr();
  if (fwd.s_aux != nullptr) params.ds_aux = gradients.ds_aux.mutable_data_ptr();
  params.dq_stride_batch = dense ? gradients.dq.stride(0) : 0;
  params.dq_stride_row = gradients.dq.stride(row);
  params.dq_stride_head = gradients.dq.stride(head);
  params.dk_stride_batch = dense ? gradients.dk.stride(0) : 0;
  params.dk_stride_row = gradients.dk.stride(row);
  params.dk_stride_head = gradients.dk.stride(head);
  params.dv_stride_batch = dense ? gradients.dv.stride(0) : 0;
  params.dv_stride_row = gradients.dv.stride(row);
  params.dv_stride_head = gradients.dv.stride(head);
  return params;
}

}  // namespace sink_attention::binding
