// The ops over key-value caches, for any backend (ops.h).
#pragma once

#include "torch/ops.h"

namespace sink_attention::binding {

template <class Backend>
struct CacheOps : Ops<Backend> {
  using Base = Ops<Backend>;
  using Base::check_values_in;
  using Base::forward;
  using Base::forward_into;
  using typename Base::FlashFwdParams;
  using typename Base::Forward;

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
    if (k_scale) {
      check(k_scale->dim() < 3,
            "k_scale must have shape (), (1,) or (num_heads_kv,): scales of each token and head "
            "are results, which reshape_and_cache.token_scales writes; got shape ",
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

  template <class Library>
  static void register_with(Library& m) {
    m.impl("paged_attn", TORCH_BOX(&paged_attn));
    m.impl("paged_attn.out", TORCH_BOX(&paged_attn_out));
    m.impl("check_paged_attn", TORCH_BOX(&check_paged_attn));
    m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
    m.impl("reshape_and_cache.token_scales", TORCH_BOX(&reshape_and_cache_token_scales));
  }
};

}  // namespace sink_attention::binding
