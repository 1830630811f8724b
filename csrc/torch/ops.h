// The ops on tensors, for any backend: checks, results from torch's allocator, one call into the
// backend.
//
// A Backend has
//     kReadsValues                      whether the host can read the tensors' values: they are
//                                       checked always, otherwise under the debug switch only
//     is_capturing(tensor)              where it cannot: whether calls are being captured in a
//                                       graph, so that nothing may wait for the device
//     may_leave_rows(problem, extent)   whether there may be rows that no sequence has
//     takes_fp8(params, tensor)         whether a kernel takes float8 q, k and v as they are
//     check_flash_fwd(problem, tensor)  throws what flash_fwd would, of a problem without results
//     flash_fwd, flash_fwd_fp8, flash_bwd, reshape_and_cache, merge_attn_states(problem,
//     operands)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "torch/check_memory.h"
#include "torch/check_values.h"
#include "torch/debug_checks.h"
#include "torch/make_params.h"

namespace sink_attention::binding {

using OptionalTensor = std::optional<Tensor>;

// The tensors that a problem points into. All are on one device; there is at least one.
struct Operands {
  std::vector<Tensor> read;
  std::vector<Tensor> written;

  Operands(std::initializer_list<Tensor> read_tensors,
           std::initializer_list<const OptionalTensor*> optional,
           std::initializer_list<Tensor> written_tensors)
      : read(read_tensors), written(written_tensors) {
    for (const OptionalTensor* tensor : optional) {
      if (*tensor) read.push_back(**tensor);
    }
  }
};

template <class Backend>
struct Ops {
  using FlashFwdParams = attention::FlashFwdParams;

  struct Forward {
    Tensor out;
    Tensor lse;
  };

  static Forward new_results(const Tensor& q, const FlashFwdParams& params) {
    const ScalarType out_type = out_scalar_type(q), lse_type = lse_scalar_type(q);
    if (q.dim() == 4) {
      return {torch::stable::new_empty(
                  q, {q.size(0), q.size(1), params.num_heads_q, params.head_dim_v}, out_type),
              torch::stable::new_empty(q, {q.size(0), params.num_heads_q, q.size(1)}, lse_type)};
    }
    return {
        torch::stable::new_empty(q, {q.size(0), params.num_heads_q, params.head_dim_v}, out_type),
        torch::stable::new_empty(q, {params.num_heads_q, q.size(0)}, lse_type)};
  }

  // Rows of q beyond the last sequence: out = 0, lse = -inf. The backend writes those of sequences
  // only.
  static void fill_unused_rows(const FlashFwdParams& params, const Extent& extent,
                               Forward& results) {
    if (params.cu_seqlens_q == nullptr || !Backend::may_leave_rows(params, extent)) return;
    torch::stable::zero_(results.out);
    torch::stable::fill_(results.lse, -std::numeric_limits<double>::infinity());
  }

  static void forward_into(const Tensor& q, FlashFwdParams params, Operands operands,
                           Forward& results) {
    set_results(params, q, results.out, results.lse);
    fill_unused_rows(params, {q.size(0), 0, 0}, results);
    operands.written = {results.out, results.lse};
    Backend::flash_fwd(params, operands);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& q, const FlashFwdParams& params,
                                            Operands operands) {
    Forward results = new_results(q, params);
    forward_into(q, params, std::move(operands), results);
    return {results.out, results.lse};
  }

  // Gradients and saved results come from autograd, with whatever strides it made.
  static Tensor with_unit_last_stride(const Tensor& tensor) {
    return tensor.dim() == 0 || has_unit_last_stride(tensor) ? tensor
                                                             : torch::stable::contiguous(tensor);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      FlashFwdParams fwd, Operands operands, const Tensor& dout, const OptionalTensor& dlse,
      const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
      const OptionalTensor& s_aux, bool deterministic) {
    const Tensor dense_dout = with_unit_last_stride(dout), dense_out = with_unit_last_stride(out),
                 dense_lse = with_unit_last_stride(lse);
    set_results(fwd, q, dense_out, dense_lse);
    // The backend writes the rows of sequences, up to seqused_k; here there may be others.
    const bool zero =
        fwd.cu_seqlens_q != nullptr &&
        (fwd.seqused_k != nullptr || Backend::may_leave_rows(fwd, {q.size(0), k.size(0), 0}));
    const auto like = [zero](const Tensor& x) {
      return zero ? torch::stable::new_zeros(x, x.sizes()) : torch::stable::new_empty(x, x.sizes());
    };
    const Gradients gradients{like(q), like(k), like(v),
                              s_aux ? torch::stable::new_zeros(*s_aux, s_aux->sizes())
                                    : torch::stable::new_empty(q, {0}, ScalarType::Float)};
    const attention::FlashBwdParams params =
        make_bwd_params(fwd, q, dense_out, dense_lse, dense_dout, dlse, gradients, deterministic);
    operands.read.insert(operands.read.end(), {dense_dout, dense_out, dense_lse});
    if (dlse) operands.read.push_back(*dlse);
    operands.written = {gradients.dq, gradients.dk, gradients.dv, gradients.ds_aux};
    Backend::flash_bwd(params, operands);
    return {gradients.dq, gradients.dk, gradients.dv, gradients.ds_aux};
  }

  static std::tuple<Tensor, Tensor> flash_attn_fwd(
      const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& s_aux,
      double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
      bool /*deterministic: of the backward*/, int64_t num_sink_tokens) {
    return forward(q,
                   make_dense_params(q, k, v, s_aux,
                                     {softmax_scale, causal, window_left, window_right, softcap,
                                      num_sink_tokens}),
                   {{q, k, v}, {&s_aux}, {}});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(
      const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& s_aux,
      double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
      bool deterministic, int64_t num_sink_tokens) {
    const FlashFwdParams fwd = make_dense_params(
        q, k, v, s_aux,
        {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens});
    return backward(fwd, {{q, k, v}, {&s_aux}, {}}, dout, dlse, q, k, v, out, lse, s_aux,
                    deterministic);
  }

  // What lengths, block table or slots hold, before a kernel uses them. args: the tensors; first:
  // one of the call's, whose device and stream count.
  template <class Params, class Limit, class Args>
  static void check_values_in(const Params& params, const Limit& limit, const Args& args,
                              const Tensor& first) {
    if constexpr (Backend::kReadsValues) {
      check_values(params, limit);
    } else if (debug_checks()) {
      check(!Backend::is_capturing(first),
            "set_debug_checks(True) waits for the device, which a captured graph cannot: call "
            "set_debug_checks(False) before the capture");
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
      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
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
      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
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
    check(args.cu_seqlens_q.has_value() == args.cu_seqlens_k.has_value() &&
              (args.cu_seqlens_q || !args.seqused_k),
          "cu_seqlens_q and cu_seqlens_k come together, and seqused_k with them");
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
    set_results(params.fwd, q, results.out, results.lse);
    Operands operands{
        {q, k, v},
        {&q_descale, &k_descale, &v_descale, &cu_seqlens_q, &cu_seqlens_k, &seqused_k, &s_aux},
        {results.out, results.lse}};
    fill_unused_rows(params.fwd, {q.size(0), 0, 0}, results);
    Backend::flash_fwd_fp8(params, operands);
    return {results.out, results.lse};
  }

  static FlashFwdParams checked_paged_params(const Tensor& q, const Tensor& k_cache,
                                             const Tensor& v_cache, const OptionalTensor& s_aux,
                                             const PagedArgs& paged, const MaskArgs& mask) {
    const FlashFwdParams params = make_paged_params(q, k_cache, v_cache, s_aux, paged, mask);
    check_values_in(params, Extent{q.size(0), 0, k_cache.size(0)}, paged, q);
    return params;
  }

  // What paged_attn would refuse, and nothing that it reads lies in the caches: for a caller that
  // writes the caches first, and must not have where attention is then refused. cache_seqlens: what
  // such a caller made seqused_k of.
  static void check_paged_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                               const Tensor& block_table, const Tensor& seqused_k,
                               const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
                               const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                               int64_t max_seqlen_q, double softmax_scale, bool causal,
                               int64_t window_left, int64_t window_right, double softcap,
                               int64_t num_splits, int64_t num_sink_tokens,
                               const OptionalTensor& tree_mask,
                               const OptionalTensor& cache_seqlens) {
    const FlashFwdParams params = checked_paged_params(
        q, k_cache, v_cache, s_aux,
        {block_table, seqused_k, cu_seqlens_q, k_scale, v_scale, max_seqlen_q, num_splits,
         tree_mask},
        {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens});
    Backend::check_flash_fwd(params, q);
    const std::initializer_list<NamedTensor> operands{{"q", q},
                                                      {"block_table", block_table},
                                                      {"seqused_k", seqused_k},
                                                      {"cache_seqlens", cache_seqlens},
                                                      {"cu_seqlens_q", cu_seqlens_q},
                                                      {"s_aux", s_aux},
                                                      {"tree_mask", tree_mask}};
    check_read_memory({{"k_cache", k_cache}, {"v_cache", v_cache}}, operands);
    if (k_scale && k_scale->dim() == 3) {
      check_read_memory({{"k_scale", k_scale}, {"v_scale", v_scale}}, operands);
    } else {
      check_read_memory({{"k_cache", k_cache}, {"v_cache", v_cache}},
                        {{"k_scale", k_scale}, {"v_scale", v_scale}});
    }
  }

  static std::tuple<Tensor, Tensor> paged_attn(
      const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
      const Tensor& seqused_k, const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
      const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t max_seqlen_q,
      double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
      int64_t num_splits, int64_t num_sink_tokens, const OptionalTensor& tree_mask) {
    return forward(q,
                   checked_paged_params(q, k_cache, v_cache, s_aux,
                                        {block_table, seqused_k, cu_seqlens_q, k_scale, v_scale,
                                         max_seqlen_q, num_splits, tree_mask},
                                        {softmax_scale, causal, window_left, window_right, softcap,
                                         num_sink_tokens}),
                   {{q, k_cache, v_cache, block_table, seqused_k},
                    {&cu_seqlens_q, &s_aux, &k_scale, &v_scale, &tree_mask},
                    {}});
  }

  static void paged_attn_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& block_table, const Tensor& seqused_k,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
                             const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                             int64_t max_seqlen_q, double softmax_scale, bool causal,
                             int64_t window_left, int64_t window_right, double softcap,
                             int64_t num_splits, int64_t num_sink_tokens,
                             const OptionalTensor& tree_mask, const Tensor& out,
                             const Tensor& lse) {
    check_memory({{"out", out}, {"lse", lse}}, {{"q", q},
                                                {"k_cache", k_cache},
                                                {"v_cache", v_cache},
                                                {"block_table", block_table},
                                                {"seqused_k", seqused_k},
                                                {"cu_seqlens_q", cu_seqlens_q},
                                                {"s_aux", s_aux},
                                                {"k_scale", k_scale},
                                                {"v_scale", v_scale},
                                                {"tree_mask", tree_mask}});
    Forward results{out, lse};
    forward_into(q,
                 checked_paged_params(
                     q, k_cache, v_cache, s_aux,
                     {block_table, seqused_k, cu_seqlens_q, k_scale, v_scale, max_seqlen_q,
                      num_splits, tree_mask},
                     {softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens}),
                 {{q, k_cache, v_cache, block_table, seqused_k},
                  {&cu_seqlens_q, &s_aux, &k_scale, &v_scale, &tree_mask},
                  {}},
                 results);
  }

  static void reshape_and_cache(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& slot_mapping,
                                const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
    const attention::ReshapeAndCacheParams params =
        make_reshape_and_cache_params(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
    check(!k_scale || k_scale->dim() < 3,
          "k_scale and v_scale of each token and head are results: reshape_and_cache.token_scales "
          "writes them, reshape_and_cache takes shapes (), (1,) and (num_heads_kv,), got ",
          k_scale ? shape_of(*k_scale) : Shape{nullptr, 0});
    const std::initializer_list<NamedTensor> operands{{"k", k},
                                                      {"v", v},
                                                      {"slot_mapping", slot_mapping},
                                                      {"k_scale", k_scale},
                                                      {"v_scale", v_scale}};
    if (values_are_part_of_keys(k, v, k_cache, v_cache)) {
      check_memory({{"k_cache", k_cache}}, operands);
    } else {
      check_memory({{"k_cache", k_cache}, {"v_cache", v_cache}}, operands);
    }
    check_values_in(params, k_cache.size(0), CacheArgs{slot_mapping, k_scale, v_scale}, k);
    Backend::reshape_and_cache(params,
                               {{k, v, slot_mapping}, {&k_scale, &v_scale}, {k_cache, v_cache}});
  }

  static void reshape_and_cache_token_scales(const Tensor& k, const Tensor& v,
                                             const Tensor& k_cache, const Tensor& v_cache,
                                             const Tensor& slot_mapping, const Tensor& k_scale,
                                             const Tensor& v_scale) {
    const attention::ReshapeAndCacheParams params =
        make_reshape_and_cache_params(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
    check(k_scale.dim() == 3,
          "k_scale must have shape (num_pages, page_size, num_heads_kv) for "
          "reshape_and_cache.token_scales, got ",
          shape_of(k_scale));
    check_memory(
        {{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_scale", k_scale}, {"v_scale", v_scale}},
        {{"k", k}, {"v", v}, {"slot_mapping", slot_mapping}});
    check_values_in(params, k_cache.size(0), CacheArgs{slot_mapping, std::nullopt, std::nullopt},
                    k);
    Backend::reshape_and_cache(params,
                               {{k, v, slot_mapping}, {}, {k_cache, v_cache, k_scale, v_scale}});
  }

  static std::tuple<Tensor, Tensor> merge_attn_states(std::vector<Tensor> outs,
                                                      std::vector<Tensor> lses,
                                                      const OptionalTensor& s_aux) {
    for (Tensor& out : outs) out = torch::stable::contiguous(out);
    for (Tensor& lse : lses) lse = torch::stable::contiguous(lse);
    MergeInputs inputs;
    attention::MergeParams params = make_merge_params(outs, lses, s_aux, inputs);
    const Tensor out = torch::stable::new_empty(outs[0], outs[0].sizes());
    const Tensor lse = torch::stable::new_empty(lses[0], lses[0].sizes());
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
    m.impl("paged_attn", TORCH_BOX(&paged_attn));
    m.impl("paged_attn.out", TORCH_BOX(&paged_attn_out));
    m.impl("check_paged_attn", TORCH_BOX(&check_paged_attn));
    m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
    m.impl("reshape_and_cache.token_scales", TORCH_BOX(&reshape_and_cache_token_scales));
    m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));
  }
};

}  // namespace sink_attention::binding
