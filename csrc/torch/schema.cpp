// Every op's schema. flash_attn_fp8_fwd and flash_attn_fp8_varlen_fwd are computed in Python
// (sink_attention_ext/fp8.py): by flash_attn_fp8_native where flash_attn_fp8_is_native. Fake kernels,
// autograd and autocast rules are registered in Python (sink_attention_ext/ops.py).
#include <torch/csrc/stable/library.h>

#include "torch/op_namespace.h"

STABLE_TORCH_LIBRARY(SA_OP_NAMESPACE, m) {
  m.def(
      "flash_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? s_aux, float? softmax_scale, "
      "bool causal, SymInt window_left, SymInt window_right, float softcap, bool deterministic, "
      "SymInt num_sink_tokens) -> (Tensor, Tensor)");
  m.def(
      "flash_attn_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? s_aux, float? softmax_scale, bool causal, SymInt window_left, "
      "SymInt window_right, float softcap, bool deterministic, SymInt num_sink_tokens) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "flash_attn_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? s_aux, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, float? softmax_scale, bool causal, SymInt window_left, "
      "SymInt window_right, float softcap, bool deterministic, SymInt num_sink_tokens) "
      "-> (Tensor, Tensor)");
  m.def(
      "flash_attn_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? s_aux, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, bool causal, "
      "SymInt window_left, SymInt window_right, float softcap, bool deterministic, "
      "SymInt num_sink_tokens) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "flash_attn_fp8_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_descale, Tensor? k_descale, "
      "Tensor? v_descale, Tensor? s_aux, float softmax_scale, bool causal, SymInt window_left, "
      "SymInt window_right, float softcap, SymInt num_sink_tokens) -> (Tensor, Tensor)");
  m.def(
      "flash_attn_fp8_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_descale, "
      "Tensor? k_descale, Tensor? v_descale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? seqused_k, Tensor? s_aux, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "SymInt num_sink_tokens) -> (Tensor, Tensor)");
  m.def(
      "flash_attn_fp8_is_native(Tensor q, Tensor k, Tensor v, Tensor? q_descale, "
      "Tensor? k_descale, Tensor? v_descale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_k, Tensor? s_aux, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "SymInt num_sink_tokens) -> bool");
  m.def(
      "flash_attn_fp8_native(Tensor q, Tensor k, Tensor v, Tensor? q_descale, Tensor? k_descale, "
      "Tensor? v_descale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
      "Tensor? s_aux, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, "
      "SymInt window_left, SymInt window_right, float softcap, SymInt num_sink_tokens) "
      "-> (Tensor, Tensor)");
  m.def(
      "paged_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
      "Tensor cache_seqlens, Tensor? cu_seqlens_q, Tensor? s_aux, Tensor? k_scale, "
      "Tensor? v_scale, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
      "bool causal, SymInt window_left, SymInt window_right, float softcap, SymInt num_splits, "
      "SymInt num_sink_tokens, Tensor? tree_mask) -> (Tensor, Tensor)");
  m.def(
      "paged_attn.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
      "Tensor cache_seqlens, Tensor? cu_seqlens_q, Tensor? s_aux, Tensor? k_scale, "
      "Tensor? v_scale, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
      "bool causal, SymInt window_left, SymInt window_right, float softcap, SymInt num_splits, "
      "SymInt num_sink_tokens, Tensor? tree_mask, *, Tensor(a!) out, Tensor(b!) lse) -> ()");
  // k_scale and v_scale are written where they have a scale for each token and head.
  m.def(
      "append_and_attend(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_seqlens, Tensor? block_table, Tensor? cu_seqlens_q, Tensor? s_aux, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "SymInt num_splits, SymInt num_sink_tokens, Tensor? tree_mask) -> (Tensor, Tensor)");
  m.def(
      "append_and_attend.out(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_seqlens, Tensor? block_table, Tensor? cu_seqlens_q, Tensor? s_aux, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "SymInt num_splits, SymInt num_sink_tokens, Tensor? tree_mask, *, Tensor(e!) out, "
      "Tensor(f!) lse) -> ()");
  m.def(
      "reshape_and_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale, bool deterministic=False) -> ()");
  m.def(
      "reshape_and_cache.token_scales(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor(c!) k_scale, Tensor(d!) v_scale, bool deterministic=False) "
      "-> ()");
  m.def("merge_attn_states(Tensor[] outs, Tensor[] lses, Tensor? s_aux) -> (Tensor, Tensor)");
  m.def("cpu_instruction_set() -> str");
  m.def("cpu_instruction_sets() -> str");
  m.def("set_cpu_instruction_set(str name) -> ()");
  m.def("cuda_kernels() -> str");
  m.def("set_cuda_kernels(str name) -> ()");
  m.def(
      "cuda_plan(Tensor q, Tensor k, Tensor v, bool paged, bool tree_mask, int num_splits, "
      "bool backward, int arch) -> str");
  m.def("debug_checks() -> bool");
  m.def("set_debug_checks(bool on) -> ()");
}
