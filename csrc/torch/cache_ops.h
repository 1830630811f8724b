// The ops over key-value caches, for any backend (ops.h).
#pragma once

#include "torch/ops.h"

namespace sink_attention::binding {

// A backend's Scratch in the device's memory, freed in the order of the stream.
class DeviceScratch {
 public:
  DeviceScratch(const Tensor& like, int64_t count)
      : tensor_(torch::stable::new_empty(like, {count}, ScalarType::Int)) {}
  int32_t* data() { return static_cast<int32_t*>(tensor_.mutable_data_ptr()); }
  void add_to(std::vector<TensorRef>& tensors) const { tensors.push_back(tensor_); }

 private:
  Tensor tensor_;
};

template <class Backend>
struct CacheOps : Ops<Backend> {
  using Base = Ops<Backend>;
  using typename Base::FlashFwdParams;
  using typename Base::Forward;
  using AppendKvParams = attention::AppendKvParams;
  using Base::check_values_in;
  using Base::forward_into;
  using Base::new_results;
  using Base::reads_values_of;

  // int32 values that kernels of one call read, as they are written before in the call.
  using Scratch = typename Backend::Scratch;

  // One call's arguments, as both ops have them.
  struct PagedCall {
    const Tensor& q;
    const Tensor& k_cache;
    const Tensor& v_cache;
    const OptionalTensor& s_aux;
    PagedArgs paged;
    MaskArgs mask;
  };

  static Operands operands_of(const PagedCall& call) {
    return {{call.q, call.k_cache, call.v_cache, call.paged.cache_seqlens},
            {&call.paged.block_table, &call.paged.cu_seqlens_q, &call.s_aux, &call.paged.k_scale,
             &call.paged.v_scale, &call.paged.tree_mask},
            {}};
  }

  static FlashFwdParams params_of(const PagedCall& call) {
    return make_paged_params(call.q, call.k_cache, call.v_cache, call.s_aux, call.paged, call.mask);
  }

  static Extent extent_of(const PagedCall& call) {
    return {call.q.size(0), 0, call.k_cache.size(0)};
  }

  static void attend_into(const PagedCall& call, FlashFwdParams params, Forward& results) {
    check_values_in(params, extent_of(call), call.paged, call.q);
    Operands operands = operands_of(call);
    if (!needs_page_table(params)) {
      forward_into(call.q, params, std::move(operands), results);
      return;
    }
    // An append of nothing, which writes the table of a dense cache.
    Scratch scratch(call.q, 2 * params.batch);
    AppendKvParams append{};
    append.page_size = params.page_size;
    append.num_pages = params.num_pages;
    append.max_pages_per_seq = 1;
    append.cache_seqlens = params.seqused_k;
    append.batch = params.batch;
    append.seqused_k = scratch.data();
    append.page_table = scratch.data() + params.batch;
    params.block_table = append.page_table;
    Backend::check_flash_fwd(params, call.q);
    scratch.add_to(operands.written);
    Backend::append_kv(append, operands);
    operands.written.clear();
    scratch.add_to(operands.read);
    forward_into(call.q, params, std::move(operands), results);
  }

  // What the backend refuses, before anything is allocated or written.
  static void check_backend(const PagedCall& call, FlashFwdParams params) {
    if (needs_page_table(params)) params.block_table = params.seqused_k;  // any: there will be one
    Backend::check_flash_fwd(params, call.q);
  }

  // Attention behind an append; nothing has been written when it throws. scratch: of 2 * batch.
  static void run(const Tensor& q, FlashFwdParams params, AppendKvParams append, Scratch& scratch,
                  Operands operands, Forward& results) {
    set_results(params, q, results.out, results.lse);
    append.seqused_k = scratch.data();
    params.seqused_k = scratch.data();
    if (needs_page_table(params)) {
      append.page_table = scratch.data() + params.batch;
      params.block_table = append.page_table;
    }
    if (params.cu_seqlens_q != nullptr) {
      append.out = params.out;
      append.lse = params.lse;
      append.out_stride_row = params.out_stride_row;
      append.out_stride_head = params.out_stride_head;
      append.lse_stride_head = params.lse_stride_head;
    }
    scratch.add_to(operands.written);
    operands.written.insert(operands.written.end(), {results.out, results.lse});
    Backend::append_kv(append, operands);
    operands.written = {results.out, results.lse};
    scratch.add_to(operands.read);
    Backend::flash_fwd(params, operands);
  }

  static void check_append_values(const PagedCall& call, const FlashFwdParams& params,
                                  const AppendKvParams& append) {
    if constexpr (Backend::kReadsValues) {
      check_values(params, append, extent_of(call));
    } else if (reads_values_of(call.q)) {
      OnHost<FlashFwdParams> host = on_host(params, call.paged);
      AppendKvParams host_append = append;
      host_append.cu_seqlens_q = host.params.cu_seqlens_q;
      host_append.cache_seqlens = host.params.seqused_k;
      host_append.block_table = host.params.block_table;
      host_append.block_table_stride = host.params.block_table_stride;
      std::vector<int32_t> seqused_k(params.batch + 1);
      host_append.seqused_k = seqused_k.data();
      host.params.seqused_k = seqused_k.data();
      check_values(host.params, host_append, extent_of(call));
    }
  }

  static void check_append_memory(const PagedCall& call, const Tensor& k, const Tensor& v,
                                  const OptionalTensor& out, const OptionalTensor& lse) {
    const PagedArgs& paged = call.paged;
    const bool writes_scales = paged.k_scale && paged.k_scale->dim() == 3;
    const OptionalTensor none;
    const OptionalTensor &k_scales = writes_scales ? paged.k_scale : none,
                         &v_scales = writes_scales ? paged.v_scale : none;
    // Values that are part of the keys are written with them.
    const bool one_cache =
        !writes_scales && values_are_part_of_keys(k, v, call.k_cache, call.v_cache);
    check_memory({{"k_cache", call.k_cache},
                  {"v_cache", one_cache ? none : call.v_cache},
                  {"k_scale", k_scales},
                  {"v_scale", v_scales},
                  {"out", out},
                  {"lse", lse}},
                 {{"q", call.q},
                  {"k", k},
                  {"v", v},
                  {"cache_seqlens", paged.cache_seqlens},
                  {"block_table", paged.block_table},
                  {"cu_seqlens_q", paged.cu_seqlens_q},
                  {"s_aux", call.s_aux},
                  {"k_scale", writes_scales ? none : paged.k_scale},
                  {"v_scale", writes_scales ? none : paged.v_scale},
                  {"tree_mask", paged.tree_mask}});
  }

  static void append_into(const PagedCall& call, FlashFwdParams params, const Tensor& k,
                          const Tensor& v, Forward& results) {
    AppendKvParams append =
        make_append_params(params, k, v, call.k_cache, call.v_cache, call.paged);
    Scratch scratch(call.q, 2 * params.batch);
    append.seqused_k = scratch.data();
    params.seqused_k = scratch.data();
    check_append_values(call, params, append);
    Operands operands = operands_of(call);
    operands.read.insert(operands.read.end(), {k, v});
    operands.written = {call.k_cache, call.v_cache};
    if (append.k_token_scales != nullptr) {
      operands.written.insert(operands.written.end(), {*call.paged.k_scale, *call.paged.v_scale});
    }
    run(call.q, params, append, scratch, std::move(operands), results);
  }

#define SA_PAGED_CALL                                                                          \
  {                                                                                            \
    q, k_cache, v_cache, s_aux, {block_table,  cache_seqlens, cu_seqlens_q, k_scale,  v_scale, \
                                 max_seqlen_q, max_seqlen_k,  num_splits,   tree_mask},        \
    {                                                                                          \
      softmax_scale, causal, window_left, window_right, softcap, num_sink_tokens               \
    }                                                                                          \
  }

  static std::tuple<Tensor, Tensor> paged_attn(
      const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
      const OptionalTensor& block_table, const Tensor& cache_seqlens,
      const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
      const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t max_seqlen_q,
      int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
      int64_t window_right, double softcap, int64_t num_splits, int64_t num_sink_tokens,
      const OptionalTensor& tree_mask) {
    const PagedCall call SA_PAGED_CALL;
    const FlashFwdParams params = params_of(call);
    Forward results = new_results(q, params);
    attend_into(call, params, results);
    return {results.out, results.lse};
  }

  static void paged_attn_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const OptionalTensor& block_table, const Tensor& cache_seqlens,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
                             const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                             bool causal, int64_t window_left, int64_t window_right, double softcap,
                             int64_t num_splits, int64_t num_sink_tokens,
                             const OptionalTensor& tree_mask, const Tensor& out,
                             const Tensor& lse) {
    const PagedCall call SA_PAGED_CALL;
    const FlashFwdParams params = params_of(call);
    check_memory({{"out", out}, {"lse", lse}}, {{"q", q},
                                                {"k_cache", k_cache},
                                                {"v_cache", v_cache},
                                                {"block_table", block_table},
                                                {"cache_seqlens", cache_seqlens},
                                                {"cu_seqlens_q", cu_seqlens_q},
                                                {"s_aux", s_aux},
                                                {"k_scale", k_scale},
                                                {"v_scale", v_scale},
                                                {"tree_mask", tree_mask}});
    Forward results{out, lse};
    attend_into(call, params, results);
  }

  static std::tuple<Tensor, Tensor> append_and_attend(
      const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
      const Tensor& v, const Tensor& cache_seqlens, const OptionalTensor& block_table,
      const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
      const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t max_seqlen_q,
      int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
      int64_t window_right, double softcap, int64_t num_splits, int64_t num_sink_tokens,
      const OptionalTensor& tree_mask) {
    const PagedCall call SA_PAGED_CALL;
    const FlashFwdParams params = params_of(call);
    check_append_memory(call, k, v, std::nullopt, std::nullopt);
    check_backend(call, params);
    Forward results = new_results(q, params);
    append_into(call, params, k, v, results);
    return {results.out, results.lse};
  }

  static void append_and_attend_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& k, const Tensor& v, const Tensor& cache_seqlens,
                                    const OptionalTensor& block_table,
                                    const OptionalTensor& cu_seqlens_q, const OptionalTensor& s_aux,
                                    const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                    int64_t max_seqlen_q, int64_t max_seqlen_k,
                                    double softmax_scale, bool causal, int64_t window_left,
                                    int64_t window_right, double softcap, int64_t num_splits,
                                    int64_t num_sink_tokens, const OptionalTensor& tree_mask,
                                    const Tensor& out, const Tensor& lse) {
    const PagedCall call SA_PAGED_CALL;
    const FlashFwdParams params = params_of(call);
    check_append_memory(call, k, v, out, lse);
    check_backend(call, params);
    Forward results{out, lse};
    append_into(call, params, k, v, results);
  }

#undef SA_PAGED_CALL

  static void reshape_and_cache(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& slot_mapping,
                                const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                bool deterministic) {
    attention::ReshapeAndCacheParams params =
        make_reshape_and_cache_params(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
    params.deterministic = deterministic;
    if (k_scale) {
      check(k_scale->dim() < 3,
            "k_scale must have shape (), (1,) or (num_heads_kv,): scales of each token and head "
            "are results, reshape_and_cache.token_scales writes them; got shape ",
            shape_of(*k_scale));
    }
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
                                             const Tensor& v_scale, bool deterministic) {
    attention::ReshapeAndCacheParams params =
        make_reshape_and_cache_params(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
    params.deterministic = deterministic;
    check(k_scale.dim() == 3,
          "k_scale must have shape (num_pages, page_size, num_heads_kv) for "
          "reshape_and_cache.token_scales; got ",
          shape_of(k_scale));
    check_memory(
        {{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_scale", k_scale}, {"v_scale", v_scale}},
        {{"k", k}, {"v", v}, {"slot_mapping", slot_mapping}});
    check_values_in(params, k_cache.size(0), CacheArgs{slot_mapping, std::nullopt, std::nullopt},
                    k);
    Backend::reshape_and_cache(params,
                               {{k, v, slot_mapping}, {}, {k_cache, v_cache, k_scale, v_scale}});
  }

  template <class Library>
  static void register_with(Library& m) {
    m.impl("paged_attn", TORCH_BOX(&paged_attn));
    m.impl("paged_attn.out", TORCH_BOX(&paged_attn_out));
    m.impl("append_and_attend", TORCH_BOX(&append_and_attend));
    m.impl("append_and_attend.out", TORCH_BOX(&append_and_attend_out));
    m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
    m.impl("reshape_and_cache.token_scales", TORCH_BOX(&reshape_and_cache_token_scales));
  }
};

}  // namespace sink_attention::binding
