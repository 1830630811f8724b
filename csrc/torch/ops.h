// The ops on tensors, for any backend: checks, results from torch's allocator, one call into the
// backend.
//
// A Backend has
//     kReadsValues                      whether the host can read the tensors' values: they are
//                                       checked always, otherwise under the debug switch only
//     is_capturing(tensor)              where it cannot: whether calls are being captured in a
//                                       graph, so that nothing may wait for the device
//     fill_unused_rows(params, operands)  of packed results, before flash_fwd or flash_bwd:
//                                       out = 0, lse = -inf, gradients = 0 in rows of no sequence
//     takes_fp8(params, tensor)         whether a kernel takes float8 q, k and v as they are
//     check_flash_fwd(problem, tensor)  throws what flash_fwd would, of a problem without results
//     Scratch(tensor, count)            memory of the call for int32 values, with data() and
//                                       add_to(operands)
//     flash_fwd, flash_fwd_fp8, flash_bwd, reshape_and_cache, append_kv, merge_attn_states(problem,
//     operands)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "torch/check_memory.h"
#include "torch/check_values.h"
#include "torch/debug_checks.h"
#include "torch/make_params.h"
#include "torch/new_tensor.h"

namespace sink_attention::binding {

using OptionalTensor = std::optional<Tensor>;

// Refers to a tensor of the op's call, which outlives the backend's.
class TensorRef {
 public:
  TensorRef(const Tensor& tensor) : tensor_(&tensor) {}
  operator const Tensor&() const { return *tensor_; }

 private:
  const Tensor* tensor_;
};

// The tensors that a params struct points into. All are on one device; there is at least one.
struct Operands {
  std::vector<TensorRef> read;
  std::vector<TensorRef> written;

  Operands(std::initializer_list<TensorRef> read_tensors,
           std::initializer_list<const OptionalTensor*> optional,
           std::initializer_list<TensorRef> written_tensors)
      : written(written_tensors) {
    read.reserve(read_tensors.size() + optional.size());
    read.insert(read.end(), read_tensors);
    for (const OptionalTensor* tensor : optional) {
      if (*tensor) read.push_back(**tensor);
    }
  }

  const Tensor& first() const { return read.front(); }
};

template <class Backend>
struct Ops {
  using FlashFwdParams = attention::FlashFwdParams;

  struct Forward {
    Tensor out;
    Tensor lse;
  };

  static Forward new_results(const Tensor& q, const FlashFwdParams& params) {
    const int32_t out_type = result_dtype(params.dtype), lse_type = lse_dtype(params.dtype);
    const int64_t heads = params.num_heads_q, head_dim = params.head_dim_v;
    if (params.cu_seqlens_q == nullptr) {
      return {new_tensor(q, {params.batch, params.seqlen_q, heads, head_dim}, out_type),
              new_tensor(q, {params.batch, heads, params.seqlen_q}, lse_type)};
    }
    return {new_tensor(q, {params.total_q, heads, head_dim}, out_type),
            new_tensor(q, {heads, params.total_q}, lse_type)};
  }

  // Into results that the caller has: they are checked.
  static void forward_into(const Tensor& q, FlashFwdParams params, Operands operands,
                           Forward& results) {
    set_results(params, q, results.out, results.lse);
    operands.written = {results.out, results.lse};
    if (params.cu_seqlens_q != nullptr) Backend::fill_unused_rows(params, operands);
    Backend::flash_fwd(params, operands);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& q, FlashFwdParams params,
                                            Operands operands) {
    Forward results = new_results(q, params);
    set_new_results(params, results.out, results.lse);
    operands.written = {results.out, results.lse};
    if (params.cu_seqlens_q != nullptr) Backend::fill_unused_rows(params, operands);
    Backend::flash_fwd(params, operands);
    return {std::move(results.out), std::move(results.lse)};
  }

  // Gradients and saved results come from autograd, with whatever strides it made.
  static Tensor with_unit_last_stride(const Tensor& tensor) {
    const bool readable = !tensor.defined() || tensor.dim() == 0 || has_unit_last_stride(tensor);
    return readable ? tensor : torch::stable::contiguous(tensor);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      FlashFwdParams fwd, Operands operands, const Tensor& dout, const OptionalTensor& dlse,
      const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
      const OptionalTensor& s_aux, bool deterministic) {
    const Tensor dense_dout = with_unit_last_stride(dout), dense_out = with_unit_last_stride(out),
                 dense_lse = with_unit_last_stride(lse);
    set_results(fwd, q, dense_out, dense_lse);
    Gradients gradients{
        new_tensor_like(q), new_tensor_like(k), new_tensor_like(v),
        s_aux ? new_zeros_like(*s_aux) : new_tensor(q, {0}, aoti_torch_dtype_float32())};
    const attention::FlashBwdParams params =
        make_bwd_params(fwd, q, dense_out, dense_lse, dense_dout, dlse, gradients, deterministic);
    operands.read.insert(operands.read.end(), {dense_dout, dense_out, dense_lse});
    if (dlse) operands.read.push_back(*dlse);
    operands.written = {gradients.dq, gradients.dk, gradients.dv, gradients.ds_aux};
    if (fwd.cu_seqlens_q != nullptr) Backend::fill_unused_rows(params, operands);
    Backend::flash_bwd(params, operands);
    return {std::move(gradients.dq), std::move(gradients.dk), std::move(gradients.dv),
            std::move(gradients.ds_aux)};
  }

  static std::tuple<Tensor, Tensor> flash_attn_fwd(
      const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& s_aux,
      std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right,
      double softcap, bool /*deterministic: of the backward*/, int64_t num_sink_tokens) {
    return forward(q,
                   make_dense_params(q, k, v, s_aux,
                                     {softmax_scale, causal, window_left, window_right, softcap,
                                      num_sink_tokens}),
                   {{q, k, v}, {&s_aux}, {}});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(
      const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& s_aux,
      std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right,
      double softcap, bool deterministic, int64_t num_sink_tokens) {
    const FlashFwdParams fwd = make_dense_params(
        q, k, v, s_aux,
        {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens});
    return backward(fwd, {{q, k, v}, {&s_aux}, {}}, dout, dlse, q, k, v, out, lse, s_aux,
                    deterministic);
  }

  // Of a backend whose values the host does not see: whether it is to look at copies of them, which
  // waits for the device of `first`.
  static bool reads_values_of(const Tensor& first) {
    if (!debug_checks()) return false;
    check_state(!Backend::is_capturing(first),
                "set_debug_checks(True) waits for the device, which a captured graph cannot: call "
                "set_debug_checks(False) before the capture");
    return true;
  }

  // What lengths, block table or slots hold, before a kernel uses them. args: the tensors; first:
  // one of the call's, whose device and stream count.
  template <class Params, class Limit, class Args>
  static void check_values_in(const Params& params, const Limit& limit, const Args& args,
                              const Tensor& first) {
    if constexpr (Backend::kReadsValues) {
      check_values(params, limit);
    } else if (reads_values_of(first)) {
      check_values(on_host(params, args).params, limit);
    }
  }

  static FlashFwdParams checked_varlen_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& s_aux, const VarlenArgs& varlen,
                                              const MaskArgs& mask,
                                              Numbers numbers = Numbers::kFloat) {
    const FlashFwdParams params = make_varlen_params(q, k, v, s_aux, varlen, mask, numbers);
    check_values_in(params, Extent{q.size(0), k.size(0), 0}, varlen, q);
    return params;
  }

  static std::tuple<Tensor, Tensor> flash_attn_varlen_fwd(
      const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
      const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& s_aux,
      int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale, bool causal,
      int64_t window_left, int64_t window_right, double softcap,
      bool /*deterministic: of the backward*/, int64_t num_sink_tokens) {
    return forward(
        q,
        checked_varlen_params(
            q, k, v, s_aux, {cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k},
            {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens}),
        {{q, k, v, cu_seqlens_q, cu_seqlens_k}, {&seqused_k, &s_aux}, {}});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_varlen_bwd(
      const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
      const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& s_aux,
      int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale, bool causal,
      int64_t window_left, int64_t window_right, double softcap, bool deterministic,
      int64_t num_sink_tokens) {
    const FlashFwdParams fwd = checked_varlen_params(
        q, k, v, s_aux, {cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k},
        {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens});
    return backward(fwd, {{q, k, v, cu_seqlens_q, cu_seqlens_k}, {&seqused_k, &s_aux}, {}}, dout,
                    dlse, q, k, v, out, lse, s_aux, deterministic);
  }

  struct Fp8Args {
    const Tensor& q;
    const Tensor& k;
    const Tensor& v;
    DescaleArgs descales;
    const OptionalTensor& cu_seqlens_q;
    const OptionalTensor& cu_seqlens_k;
    const OptionalTensor& seqused_k;
    const OptionalTensor& s_aux;
    int64_t max_seqlen_q;
    int64_t max_seqlen_k;
  };

  // Dense, or varlen with cu_seqlens_q.
  static attention::FlashFwdFp8Params checked_fp8_params(const Fp8Args& args,
                                                         const MaskArgs& mask) {
    check(
        args.cu_seqlens_q.has_value() == args.cu_seqlens_k.has_value() &&
            (args.cu_seqlens_q || !args.seqused_k),
        "cu_seqlens_q must be given where cu_seqlens_k or seqused_k is, and cu_seqlens_k with it");
    const FlashFwdParams fwd =
        args.cu_seqlens_q
            ? checked_varlen_params(args.q, args.k, args.v, args.s_aux,
                                    {*args.cu_seqlens_q, *args.cu_seqlens_k, args.seqused_k,
                                     args.max_seqlen_q, args.max_seqlen_k},
                                    mask, Numbers::kFloat8)
            : make_dense_params(args.q, args.k, args.v, args.s_aux, mask, Numbers::kFloat8);
    return make_fp8_params(fwd, args.q, args.descales);
  }

  // Whether a kernel runs such a call on float8 as it is. Refuses what flash_attn_fp8_native does.
  static bool flash_attn_fp8_is_native(
      const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_descale,
      const OptionalTensor& k_descale, const OptionalTensor& v_descale,
      const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& seqused_k, const OptionalTensor& s_aux, int64_t max_seqlen_q,
      int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
      int64_t window_right, double softcap, int64_t num_sink_tokens) {
    const Fp8Args args{q,
                       k,
                       v,
                       {q_descale, k_descale, v_descale},
                       cu_seqlens_q,
                       cu_seqlens_k,
                       seqused_k,
                       s_aux,
                       max_seqlen_q,
                       max_seqlen_k};
    return Backend::takes_fp8(checked_fp8_params(args, {softmax_scale, causal, window_left,
                                                        window_right, softcap, num_sink_tokens}),
                              q);
  }

  static std::tuple<Tensor, Tensor> flash_attn_fp8_native(
      const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_descale,
      const OptionalTensor& k_descale, const OptionalTensor& v_descale,
      const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& seqused_k, const OptionalTensor& s_aux, int64_t max_seqlen_q,
      int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
      int64_t window_right, double softcap, int64_t num_sink_tokens) {
    const Fp8Args args{q,
                       k,
                       v,
                       {q_descale, k_descale, v_descale},
                       cu_seqlens_q,
                       cu_seqlens_k,
                       seqused_k,
                       s_aux,
                       max_seqlen_q,
                       max_seqlen_k};
    attention::FlashFwdFp8Params params = checked_fp8_params(
        args, {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens});
    Forward results = new_results(q, params.fwd);
    set_new_results(params.fwd, results.out, results.lse);
    const Operands operands{
        {q, k, v},
        {&q_descale, &k_descale, &v_descale, &cu_seqlens_q, &cu_seqlens_k, &seqused_k, &s_aux},
        {results.out, results.lse}};
    if (cu_seqlens_q) Backend::fill_unused_rows(params.fwd, operands);
    Backend::flash_fwd_fp8(params, operands);
    return {results.out, results.lse};
  }

  static std::tuple<Tensor, Tensor> merge_attn_states(std::vector<Tensor> outs,
                                                      std::vector<Tensor> lses,
                                                      const OptionalTensor& s_aux) {
    for (std::vector<Tensor>* parts : {&outs, &lses}) {
      for (Tensor& part : *parts) {
        if (!part.is_contiguous()) part = torch::stable::contiguous(part);
      }
    }
    MergeInputs inputs;
    attention::MergeParams params = make_merge_params(outs, lses, s_aux, inputs);
    const Tensor out = new_tensor_like(outs[0]), lse = new_tensor_like(lses[0]);
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr();
    Operands operands{{}, {&s_aux}, {out, lse}};
    operands.read.insert(operands.read.end(), outs.begin(), outs.end());
    operands.read.insert(operands.read.end(), lses.begin(), lses.end());
    Backend::merge_attn_states(params, operands);
    return {out, lse};
  }

  // Registers all of them with a dispatch key's library.
  template <class Library>
  static void register_with(Library& m) {
    m.impl("flash_attn_fwd", TORCH_BOX(&flash_attn_fwd));
    m.impl("flash_attn_bwd", TORCH_BOX(&flash_attn_bwd));
    m.impl("flash_attn_varlen_fwd", TORCH_BOX(&flash_attn_varlen_fwd));
    m.impl("flash_attn_varlen_bwd", TORCH_BOX(&flash_attn_varlen_bwd));
    m.impl("flash_attn_fp8_is_native", TORCH_BOX(&flash_attn_fp8_is_native));
    m.impl("flash_attn_fp8_native", TORCH_BOX(&flash_attn_fp8_native));
    m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));
  }
};

}  // namespace sink_attention::binding
