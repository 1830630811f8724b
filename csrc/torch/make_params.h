// From an op's arguments to its problem struct: every check of shape, dtype, device and stride, and
// no computation. The same for every device; what the tensors hold is checked apart
// (check_values.h).
#pragma once

#include <vector>

#include "attention/fp8_params.h"
#include "torch/checks.h"

namespace sink_attention::binding {

struct MaskArgs {                       // what q, k scores go through, as the schemas order it
  std::optional<double> softmax_scale;  // none: head_dim ** -0.5
  bool causal;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  int64_t num_sink_tokens;
};

struct VarlenArgs {
  const Tensor& cu_seqlens_q;
  const Tensor& cu_seqlens_k;
  const std::optional<Tensor>& seqused_k;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
};

struct PagedArgs {
  const std::optional<Tensor>& block_table;  // none: a dense cache, whose row b is sequence b's
  const Tensor& cache_seqlens;               // keys of each sequence, before an append
  const std::optional<Tensor>& cu_seqlens_q;
  const std::optional<Tensor>& k_scale;
  const std::optional<Tensor>& v_scale;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  int64_t num_splits;
  const std::optional<Tensor>& tree_mask;
};

struct CacheArgs {  // of a write; its scales where they are read
  const Tensor& slot_mapping;
  const std::optional<Tensor>& k_scale;
  const std::optional<Tensor>& v_scale;
};

struct DescaleArgs {
  const std::optional<Tensor>& q;
  const std::optional<Tensor>& k;
  const std::optional<Tensor>& v;
};

enum class Numbers { kFloat, kFloat8 };  // that q, k and v have: 16 bits or more, or 8

// Params without their results, which set_results adds.
attention::FlashFwdParams make_dense_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& s_aux,
                                            const MaskArgs& mask,
                                            Numbers numbers = Numbers::kFloat);
attention::FlashFwdParams make_varlen_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& s_aux,
                                             const VarlenArgs& varlen, const MaskArgs& mask,
                                             Numbers numbers = Numbers::kFloat);
// fwd: of Numbers::kFloat8, dense or varlen.
attention::FlashFwdFp8Params make_fp8_params(const attention::FlashFwdParams& fwd, const Tensor& q,
                                             const DescaleArgs& descales);
// Where there is no block_table, params.block_table is null: needs_page_table says whether it is to
// be set to pages 0, 1, ..., batch - 1.
attention::FlashFwdParams make_paged_params(const Tensor& q, const Tensor& k_cache,
                                            const Tensor& v_cache,
                                            const std::optional<Tensor>& s_aux,
                                            const PagedArgs& paged, const MaskArgs& mask);

inline bool needs_page_table(const attention::FlashFwdParams& params) {
  return params.block_table == nullptr;
}

// fwd: of the same call, by make_paged_params, its block_table null where the call has none.
attention::AppendKvParams make_append_params(const attention::FlashFwdParams& fwd, const Tensor& k,
                                             const Tensor& v, const Tensor& k_cache,
                                             const Tensor& v_cache, const PagedArgs& paged);

// out: q's leading dimensions and head_dim_v; lse: (batch, num_heads_q, seqlen_q), or (num_heads_q,
// total_q) where q has three dimensions.
void set_results(attention::FlashFwdParams& params, const Tensor& q, const Tensor& out,
                 const Tensor& lse);

// The same for results made for the call, contiguous and of the right shape.
void set_new_results(attention::FlashFwdParams& params, const Tensor& out, const Tensor& lse);

// Of out, and of lse, for q of `dtype`, as aoti_torch_get_dtype spells them.
int32_t result_dtype(DataType dtype);
int32_t lse_dtype(DataType dtype);

struct Gradients {
  Tensor dq, dk, dv;
  Tensor ds_aux;  // (0,) where there is no sink
};

// fwd holds the forward's results already.
attention::FlashBwdParams make_bwd_params(const attention::FlashFwdParams& fwd, const Tensor& q,
                                          const Tensor& out, const Tensor& lse, const Tensor& dout,
                                          const std::optional<Tensor>& dlse,
                                          const Gradients& gradients, bool deterministic);

attention::ReshapeAndCacheParams make_reshape_and_cache_params(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& slot_mapping, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale);

// Holds the arrays of pointers that a merge problem points to.
struct MergeInputs {
  std::vector<const void*> outs;
  std::vector<const void*> lses;
};
attention::MergeParams make_merge_params(const std::vector<Tensor>& outs,
                                         const std::vector<Tensor>& lses,
                                         const std::optional<Tensor>& s_aux, MergeInputs& inputs);

}  // namespace sink_attention::binding
