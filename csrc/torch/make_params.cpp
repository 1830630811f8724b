#include "torch/make_params.h"

#include <algorithm>

#include "torch/set_params.h"

namespace sink_attention::binding {
namespace {

using attention::FlashFwdParams;
using attention::MergeParams;

// Names in messages: of k and v and of their dimensions before (num_heads_kv, head_dim).
constexpr KeyNames kDenseKeys{"k", "v", {"batch", "seqlen_k"}};
constexpr KeyNames kPackedKeys{"k", "v", {"total_k", nullptr}};

// Wider than any sequence. Wider windows are clamped to it, so that no sum with a length overflows.
constexpr int64_t kWidestWindow = int64_t{1} << 40;

// Of what scores are multiplied with, which is computed in float32, in float64 for float64.
struct FactorRange {
  double least;    // the smallest normal number
  double largest;  // more than 20 powers of two below infinity: products with scores are finite
  double largest_ratio;  // a normal number; beyond, tanh has its ends
  const char* text;
};

FactorRange factor_range(DataType dtype) {
  if (dtype == DataType::kFloat64) {
    return {0x1p-1022, 0x1p1000, 0x1p1022, "2**-1022 to 2**1000 (float64)"};
  }
  return {0x1p-126, 0x1p100, 0x1p126, "2**-126 to 2**100 (float32)"};
}

void check_factors(double softmax_scale, double softcap, DataType dtype) {
  const FactorRange range = factor_range(dtype);
  const auto has_range = [range](double value) {
    return std::abs(value) >= range.least && std::abs(value) <= range.largest;
  };
  check(has_range(softmax_scale), "softmax_scale must be finite and not 0, its magnitude from ",
        range.text, "; got ", Float{softmax_scale},
        " (the argument after v is softmax_scale, not FlashAttention 2's dropout_p)");
  if (softcap == 0) return;
  check(softcap > 0 && has_range(softcap), "softcap must be finite and at least 0, 0.0 (none) or ",
        range.text, "; got ", Float{softcap});
  check(std::abs(softmax_scale) / softcap <= range.largest_ratio,
        "softmax_scale / softcap must have a magnitude of at most ", range.largest_ratio, "; got ",
        Float{softmax_scale}, " / ", Float{softcap});
}

int64_t window_bound(int64_t bound, const char* name) {
  check(bound >= -1,
        "window_size must hold numbers of tokens from 0, or -1 for unbounded; got window_", name,
        " = ", bound);
  return std::min(bound, kWidestWindow);
}

DataType numbers_type(const Tensor& q, Numbers numbers) {
  if (numbers == Numbers::kFloat) return float_type(q, "q");
  check_dtype(q, "q", ScalarType::Float8_e4m3fn);
  return DataType::kFloat8E4M3;
}

// What to do about sinks of all heads beside one tensor parallel rank's share of the heads.
struct UnshardedSinks {
  const Tensor& s_aux;
  int64_t num_heads;
};
std::ostream& operator<<(std::ostream& text, const UnshardedSinks& hint) {
  if (hint.s_aux.dim() != 1 || hint.num_heads == 0) return text;
  const int64_t num_sinks = hint.s_aux.size(0);
  if (num_sinks <= hint.num_heads || num_sinks % hint.num_heads != 0) return text;
  return text << ". s_aux has " << num_sinks << " logits, q has " << hint.num_heads
              << " heads: under tensor parallelism shard the sinks with the heads "
                 "(GPT_OSS_TP_PLAN or shard_s_aux of sink_attention_ext.parallel)";
}

}  // namespace

void check_head_dim(int64_t head_dim, const Tensor& tensor, const char* name,
                    const char* dim_name) {
  check(head_dim >= 1 && head_dim <= kMaxHeadDim, name, " must have ", dim_name, " from 1 to ",
        kMaxHeadDim, "; got ", head_dim, " (shape ", shape_of(tensor), ")");
}

void set_mask(FlashFwdParams& params, const MaskArgs& mask) {
  // As Python computes head_dim ** -0.5.
  params.softmax_scale = mask.softmax_scale ? *mask.softmax_scale
                                            : std::pow(static_cast<double>(params.head_dim), -0.5);
  params.softcap = mask.softcap;
  check_factors(params.softmax_scale, params.softcap, params.dtype);
  params.window_left = window_bound(mask.window_left, "left");
  const int64_t right = window_bound(mask.window_right, "right");
  params.window_right = mask.causal ? 0 : right;
  check(mask.num_sink_tokens >= 0,
        "num_sink_tokens must be at least 0, the first tokens that stay visible beside a sliding "
        "window; got ",
        mask.num_sink_tokens);
  params.num_sink_tokens = mask.num_sink_tokens;
}

const void* sink_data(const std::optional<Tensor>& s_aux, int64_t num_heads, const Tensor& q,
                      DataType& dtype) {
  if (!s_aux) return nullptr;
  check(s_aux->dim() == 1 && s_aux->size(0) == num_heads,
        "s_aux must have shape (num_heads_q,) = (", num_heads,
        ",), one sink per query head; got shape ", shape_of(*s_aux),
        UnshardedSinks{*s_aux, num_heads});
  dtype = float_type(*s_aux, "s_aux");
  check_same_device(*s_aux, "s_aux", q);
  check_unit_last_stride(*s_aux, "s_aux");
  return s_aux->const_data_ptr();
}

void set_qkv(FlashFwdParams& params, const Tensor& q, const Tensor& k, const Tensor& v,
             const KeyNames& names, Numbers numbers) {
  params.dtype = numbers_type(q, numbers);
  params.kv_dtype = params.dtype;
  check_same_device(k, names.k, q);
  check_same_device(v, names.v, q);
  const auto q_sizes = q.sizes(), k_sizes = k.sizes(), v_sizes = v.sizes();
  const auto q_strides = q.strides(), k_strides = k.strides(), v_strides = v.strides();
  const size_t q_rank = q_sizes.size(), k_rank = k_sizes.size();
  params.num_heads_q = q_sizes[q_rank - 2];
  params.head_dim = q_sizes[q_rank - 1];
  params.num_heads_kv = k_sizes[k_rank - 2];
  params.head_dim_v = v_sizes[k_rank - 1];
  check(params.num_heads_q >= 1, "q must have num_heads_q of at least 1; got shape ", shape_of(q));
  check(params.num_heads_kv >= 1 && params.num_heads_q % params.num_heads_kv == 0, names.k,
        " must have num_heads_kv that divides num_heads_q = ", params.num_heads_q, "; got ",
        params.num_heads_kv, " (shape ", shape_of(k), ")");
  check_size(v, names.v, k_rank - 2, "num_heads_kv", params.num_heads_kv, names.k);
  check_head_dim(params.head_dim, q, "q", "head_dim");
  check_head_dim(params.head_dim_v, v, names.v, "head_dim_v");
  check_size(k, names.k, k_rank - 1, "head_dim", params.head_dim, "q");
  check_unit_last_stride(q, "q");
  check_unit_last_stride(k, names.k);
  check_unit_last_stride(v, names.v);
  for (size_t i = 0; i + 2 < k_rank; ++i) {
    check_size(v, names.v, i, names.dims[i], k_sizes[i], names.k);
  }
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.total_q = q_rank == 4 ? q_sizes[0] * q_sizes[1] : q_sizes[0];
  params.q_stride_batch = q_rank == 4 ? q_strides[0] : 0;
  params.q_stride_row = q_strides[q_rank - 3];
  params.q_stride_head = q_strides[q_rank - 2];
  params.k_stride_batch = k_rank == 4 ? k_strides[0] : 0;
  params.k_stride_row = k_strides[k_rank - 3];
  params.k_stride_head = k_strides[k_rank - 2];
  params.v_stride_batch = k_rank == 4 ? v_strides[0] : 0;
  params.v_stride_row = v_strides[k_rank - 3];
  params.v_stride_head = v_strides[k_rank - 2];
}

FlashFwdParams make_dense_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::optional<Tensor>& s_aux, const MaskArgs& mask,
                                 Numbers numbers) {
  FlashFwdParams params{};
  check_rank(q, "q", 4, "(batch, seqlen_q, num_heads_q, head_dim)");
  check_rank(k, "k", 4, "(batch, seqlen_k, num_heads_kv, head_dim)");
  check_rank(v, "v", 4, "(batch, seqlen_k, num_heads_kv, head_dim_v)");
  numbers_type(q, numbers);  // what q cannot be comes before what k and v then should
  check_same_dtype(k, "k", q, "q");
  check_same_dtype(v, "v", q, "q");
  const auto q_sizes = q.sizes(), k_sizes = k.sizes();
  params.batch = q_sizes[0];
  check_size(k, "k", 0, "batch", params.batch, "q");
  set_qkv(params, q, k, v, kDenseKeys, numbers);
  params.s_aux = sink_data(s_aux, params.num_heads_q, q, params.s_aux_dtype);
  params.seqlen_q = q_sizes[1];
  params.seqlen_k = k_sizes[1];
  params.total_k = k_sizes[0] * k_sizes[1];
  set_mask(params, mask);
  return params;
}

FlashFwdParams make_varlen_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& s_aux, const VarlenArgs& varlen,
                                  const MaskArgs& mask, Numbers numbers) {
  FlashFwdParams params{};
  check_rank(q, "q", 3, "(total_q, num_heads_q, head_dim)");
  check_rank(k, "k", 3, "(total_k, num_heads_kv, head_dim)");
  check_rank(v, "v", 3, "(total_k, num_heads_kv, head_dim_v)");
  numbers_type(q, numbers);  // what q cannot be comes before what k and v then should
  check_same_dtype(k, "k", q, "q");
  check_same_dtype(v, "v", q, "q");
  set_qkv(params, q, k, v, kPackedKeys, numbers);
  params.s_aux = sink_data(s_aux, params.num_heads_q, q, params.s_aux_dtype);
  check_rank(varlen.cu_seqlens_q, "cu_seqlens_q", 1, "(batch + 1,)");
  const int64_t num_bounds = varlen.cu_seqlens_q.size(0);
  check_dtype(varlen.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int);
  check(num_bounds >= 1, "cu_seqlens_q must have batch + 1 entries, at least 1; got shape (0,)");
  params.batch = num_bounds - 1;
  params.cu_seqlens_q =
      int32_vector(varlen.cu_seqlens_q, "cu_seqlens_q", num_bounds, q, "batch + 1");
  params.cu_seqlens_k =
      int32_vector(varlen.cu_seqlens_k, "cu_seqlens_k", num_bounds, q, "batch + 1", "cu_seqlens_q");
  if (varlen.seqused_k) {
    params.seqused_k =
        int32_vector(*varlen.seqused_k, "seqused_k", params.batch, q, "batch", "cu_seqlens_q");
  }
  check_at_least(varlen.max_seqlen_q, "max_seqlen_q", 0);
  check_at_least(varlen.max_seqlen_k, "max_seqlen_k", 0);
  // Callers may give a bound for all batches: none of this one's sequences is longer than all.
  params.total_k = k.size(0);
  params.seqlen_q = std::min(varlen.max_seqlen_q, params.total_q);
  params.seqlen_k = std::min(varlen.max_seqlen_k, params.total_k);
  set_mask(params, mask);
  return params;
}

attention::FlashFwdFp8Params make_fp8_params(const FlashFwdParams& fwd, const Tensor& q,
                                             const DescaleArgs& descales) {
  const auto descale = [&](const std::optional<Tensor>& tensor,
                           const char* name) -> attention::Descale {
    if (!tensor) return {};
    check_same_device(*tensor, name, q);
    check_dtype(*tensor, name, ScalarType::Float);
    check_shape(*tensor, name, {fwd.batch, fwd.num_heads_kv}, "(batch, num_heads_kv)");
    return {tensor->const_data_ptr<float>(), tensor->stride(0), tensor->stride(1)};
  };
  return {fwd, descale(descales.q, "q_descale"), descale(descales.k, "k_descale"),
          descale(descales.v, "v_descale")};
}

MergeParams make_merge_params(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                              const std::optional<Tensor>& s_aux, MergeInputs& inputs) {
  check(!outs.empty() && outs.size() == lses.size(),
        "outs and lses must have the same length of at least 1; got ", outs.size(), " outs and ",
        lses.size(), " lses");
  const Tensor& first = outs[0];
  const bool dense = first.dim() == 4;
  MergeParams params{};
  params.dtype = float_type(first, "outs[0]");
  check(dense || first.dim() == 3,
        "outs[0] must have 4 dimensions (batch, seqlen, num_heads, head_dim) or 3 (total, "
        "num_heads, head_dim); got shape ",
        shape_of(first));
  params.num_parts = static_cast<int64_t>(outs.size());
  params.batch = dense ? first.size(0) : 1;
  params.seqlen = first.size(dense ? 1 : 0);
  params.num_heads = first.size(dense ? 2 : 1);
  params.head_dim = first.size(dense ? 3 : 2);
  inputs.outs.reserve(outs.size());
  inputs.lses.reserve(lses.size());
  for (size_t part = 0; part < outs.size(); ++part) {
    const std::string out_name = "outs[" + std::to_string(part) + "]",
                      lse_name = "lses[" + std::to_string(part) + "]";
    const Tensor &out = outs[part], &lse = lses[part];
    check_same_dtype(out, out_name.c_str(), first, "outs[0]");
    check_dtype(lse, lse_name.c_str(), lse_scalar_type(first));
    check_same_device(out, out_name.c_str(), first);
    check_same_device(lse, lse_name.c_str(), first);
    check(out.sizes().equals(first.sizes()), out_name, " must have the shape of outs[0], ",
          shape_of(first), "; got ", shape_of(out));
    if (dense) {
      check_shape(lse, lse_name.c_str(), {params.batch, params.num_heads, params.seqlen},
                  "(batch, num_heads, seqlen), heads before rows");
    } else {
      check_shape(lse, lse_name.c_str(), {params.num_heads, params.seqlen},
                  "(num_heads, total), heads before rows");
    }
    inputs.outs.push_back(out.const_data_ptr());
    inputs.lses.push_back(lse.const_data_ptr());
  }
  params.outs = inputs.outs.data();
  params.lses = inputs.lses.data();
  params.s_aux = sink_data(s_aux, params.num_heads, first, params.s_aux_dtype);
  return params;
}

}  // namespace sink_attention::binding
