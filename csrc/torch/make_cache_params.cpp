// Params of the ops over key-value caches.
#include <algorithm>

#include "attention/mask.h"
#include "attention/paged_kv.h"
#include "torch/make_params.h"
#include "torch/set_params.h"

namespace sink_attention::binding {
namespace {

using attention::AppendKvParams;
using attention::FlashFwdParams;
using attention::KvWriteParams;
using attention::ReshapeAndCacheParams;

constexpr const char* kPaged = "(num_pages, page_size, num_heads_kv, head_dim)";

// What k_cache holds: float8, int8, or values of the dtype of q, or of new keys.
DataType cache_type(const Tensor& k_cache, const Tensor& q, const char* q_name, DataType q_type) {
  switch (k_cache.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      return DataType::kFloat8E4M3;
    case ScalarType::Char:
      return DataType::kInt8;
    default:
      float_type(k_cache, "k_cache");
      check_type(q.scalar_type() == k_cache.scalar_type(), q_name,
                 " must have the dtype of k_cache, ", dtype_name(k_cache.scalar_type()), "; got ",
                 dtype_name(q.scalar_type()));
      return q_type;
  }
}

void check_page_size(const Tensor& k_cache) {
  check(k_cache.size(1) >= 1, "k_cache must have page_size of at least 1; got shape ",
        shape_of(k_cache));
}

bool are_token_scales(const std::optional<Tensor>& scale) { return scale && scale->dim() == 3; }

// Scales of k or v per tensor or kv head, float32 of shape (), (1,) or (num_heads_kv,).
const float* cache_scale(const Tensor& scale, const char* name, const Tensor& cache) {
  const int64_t num_heads_kv = cache.size(2);
  const bool one = scale.dim() == 0 || (scale.dim() == 1 && scale.size(0) == 1);
  check(one || (scale.dim() == 1 && scale.size(0) == num_heads_kv), name,
        " must have shape (), (1,), (num_heads_kv,) = (", num_heads_kv,
        ",) or, one for each token and head, (num_pages, page_size, num_heads_kv); got ",
        shape_of(scale));
  if (!one) check_unit_last_stride(scale, name);
  return scale.const_data_ptr<float>();
}

template <class T>
T* float_data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return tensor.const_data_ptr<float>();
  } else {
    return static_cast<float*>(tensor.mutable_data_ptr());
  }
}

// 8-bit caches come with both scales, of one kind; others with none. Token scales, as large as the
// cache but for head_dim, are left in token_scales as T* (const where they are only read).
template <class T, class Params>
void set_cache_scales(Params& params, DataType cache_dtype, const Tensor& k_cache,
                      const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const std::pair<const char*, const std::optional<Tensor>*> scales[] = {{"k_scale", &k_scale},
                                                                         {"v_scale", &v_scale}};
  for (const auto& [name, scale] : scales) {
    if (!attention::is_8_bit(cache_dtype)) {
      check(!*scale, name,
            " must be None: it is only for float8_e4m3fn and int8 caches, got one of ",
            dtype_name(k_cache.scalar_type()));
      continue;
    }
    check(scale->has_value(), name, " must be given for a ", dtype_name(k_cache.scalar_type()),
          " cache");
    check_same_device(**scale, name, k_cache);
    check_dtype(**scale, name, ScalarType::Float);
  }
  if (!attention::is_8_bit(cache_dtype)) return;
  check(are_token_scales(k_scale) == are_token_scales(v_scale),
        "k_scale and v_scale must be of one kind, both for each token or neither; got shapes ",
        shape_of(*k_scale), " and ", shape_of(*v_scale));
  if (!are_token_scales(k_scale)) {
    params.k_scale = cache_scale(*k_scale, "k_scale", k_cache);
    params.v_scale = cache_scale(*v_scale, "v_scale", k_cache);
    check(k_scale->numel() == v_scale->numel(), "k_scale and v_scale must have one shape; got ",
          shape_of(*k_scale), " and ", shape_of(*v_scale));
    params.kv_scale_stride = k_scale->numel() > 1 ? 1 : 0;
    return;
  }
  for (const auto& [name, scale] : scales) {
    check_shape(**scale, name, {k_cache.size(0), k_cache.size(1), k_cache.size(2)});
  }
  params.k_token_scales = float_data<T>(*k_scale);
  params.k_scale_stride_page = k_scale->stride(0);
  params.k_scale_stride_slot = k_scale->stride(1);
  params.k_scale_stride_head = k_scale->stride(2);
  params.v_token_scales = float_data<T>(*v_scale);
  params.v_scale_stride_page = v_scale->stride(0);
  params.v_scale_stride_slot = v_scale->stride(1);
  params.v_scale_stride_head = v_scale->stride(2);
}

void set_written_caches(KvWriteParams& params, const Tensor& k_cache, const Tensor& v_cache) {
  params.k_cache = k_cache.mutable_data_ptr();
  params.v_cache = v_cache.mutable_data_ptr();
  params.k_cache_stride_page = k_cache.stride(0);
  params.k_cache_stride_slot = k_cache.stride(1);
  params.k_cache_stride_head = k_cache.stride(2);
  params.v_cache_stride_page = v_cache.stride(0);
  params.v_cache_stride_slot = v_cache.stride(1);
  params.v_cache_stride_head = v_cache.stride(2);
}

// The pages of each sequence, and seqlen_k, what they hold; params.batch is set.
void set_pages(FlashFwdParams& params, const Tensor& k_cache,
               const std::optional<Tensor>& block_table, const Tensor& q) {
  // An empty table is still one: a null pointer means that there is none.
  static const int32_t no_pages = 0;
  params.page_size = k_cache.size(1);
  params.num_pages = k_cache.size(0);
  if (!block_table) {
    check(params.num_pages == params.batch, "k_cache must have batch = ", params.batch,
          " rows without block_table, one for each sequence; got shape ", shape_of(k_cache));
    params.seqlen_k = params.page_size;
    params.block_table_stride = 1;
    if (params.page_size > 0 && params.batch > 0) return;
    params.block_table = &no_pages;  // of no page: pages have a size
    params.page_size = 1;
    params.num_pages = 0;
    params.block_table_stride = 0;
    return;
  }
  const Tensor& table = *block_table;
  check_rank(table, "block_table", 2, "(batch, max_pages_per_seq)");
  check_dtype(table, "block_table", ScalarType::Int);
  check_unit_last_stride(table, "block_table");
  check_same_device(table, "block_table", q);
  check(table.size(0) == params.batch, "block_table must have batch = ", params.batch, " rows, as ",
        params.cu_seqlens_q ? "cu_seqlens_q" : "q", " has; got shape ", shape_of(table));
  check_page_size(k_cache);
  params.seqlen_k = table.size(1) * params.page_size;
  params.block_table_stride = table.stride(0);
  params.block_table = table.numel() > 0 ? table.const_data_ptr<int32_t>() : &no_pages;
}

// int64, a word for each row of q; set_mask and the lengths come first.
void set_tree_mask(FlashFwdParams& params, const std::optional<Tensor>& tree_mask,
                   const Tensor& q) {
  if (!tree_mask) return;
  const bool packed = q.dim() == 3;
  check_dtype(*tree_mask, "tree_mask", ScalarType::Long);
  check_same_device(*tree_mask, "tree_mask", q);
  if (packed) {
    check_shape(*tree_mask, "tree_mask", {q.size(0)});
  } else {
    check_shape(*tree_mask, "tree_mask", {q.size(0), q.size(1)});
  }
  check_unit_last_stride(*tree_mask, "tree_mask");
  check(params.window_right == 0, "tree_mask needs causal (or window_right = 0); got window_right ",
        params.window_right);
  check(params.seqlen_q <= attention::kMaxDraftTokens,
        packed ? "max_seqlen_q must be at most " : "seqlen_q of q must be at most ",
        attention::kMaxDraftTokens, " with tree_mask (a bit for each draft token); got ",
        params.seqlen_q);
  static const int64_t no_words = 0;  // an empty mask is still one
  params.tree_mask = tree_mask->numel() > 0 ? tree_mask->const_data_ptr<int64_t>() : &no_words;
  params.tree_mask_stride = packed ? 0 : tree_mask->stride(0);
}

}  // namespace

FlashFwdParams make_paged_params(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const std::optional<Tensor>& s_aux, const PagedArgs& paged,
                                 const MaskArgs& mask) {
  FlashFwdParams params{};
  if (paged.cu_seqlens_q) {
    check_rank(q, "q", 3, "(total_q, num_heads, head_dim) with cu_seqlens_q");
  } else {
    check_rank(q, "q", 4, "(batch, seqlen_q, num_heads, head_dim) without cu_seqlens_q");
  }
  check_rank(k_cache, "k_cache", 4, kPaged);
  check_rank(v_cache, "v_cache", 4, kPaged);
  const DataType kv_dtype = cache_type(k_cache, q, "q", float_type(q, "q"));
  check_dtype(v_cache, "v_cache", k_cache.scalar_type());
  set_qkv(params, q, k_cache, v_cache, {"k_cache", "v_cache", {"num_pages", "page_size"}});
  params.kv_dtype = kv_dtype;
  set_cache_scales<const float>(params, kv_dtype, k_cache, paged.k_scale, paged.v_scale);
  params.s_aux = sink_data(s_aux, params.num_heads_q, q, params.s_aux_dtype);

  if (paged.cu_seqlens_q) {
    check(paged.cu_seqlens_q->dim() == 1 && paged.cu_seqlens_q->numel() >= 1,
          "cu_seqlens_q must have shape (batch + 1,); got ", shape_of(*paged.cu_seqlens_q));
    params.batch = paged.cu_seqlens_q->numel() - 1;
    params.cu_seqlens_q = int32_vector(*paged.cu_seqlens_q, "cu_seqlens_q", params.batch + 1, q);
    check(paged.max_seqlen_q >= 0, "max_seqlen_q must be >= 0; got ", paged.max_seqlen_q);
    params.seqlen_q = std::min(paged.max_seqlen_q, q.size(0));
  } else {
    params.batch = q.size(0);
    params.seqlen_q = q.size(1);
    check(paged.max_seqlen_q >= params.seqlen_q,
          "max_seqlen_q must be at least seqlen_q = ", params.seqlen_q, "; got ",
          paged.max_seqlen_q);
  }
  set_pages(params, k_cache, paged.block_table, q);
  params.seqused_k = int32_vector(paged.cache_seqlens, "cache_seqlens", params.batch, q);
  check(paged.max_seqlen_k >= 0, "max_seqlen_k must be >= 0; got ", paged.max_seqlen_k);
  params.seqlen_k = std::min(params.seqlen_k, paged.max_seqlen_k);
  check(paged.num_splits >= 0, "num_splits must be >= 0 (0: chosen); got ", paged.num_splits);
  params.num_splits = paged.num_splits;
  set_mask(params, mask);
  set_tree_mask(params, paged.tree_mask, q);
  return params;
}

AppendKvParams make_append_params(const FlashFwdParams& fwd, const Tensor& k, const Tensor& v,
                                  const Tensor& k_cache, const Tensor& v_cache,
                                  const PagedArgs& paged) {
  AppendKvParams params{};
  const bool packed = fwd.cu_seqlens_q != nullptr;
  const int64_t row = packed ? 0 : 1;
  params.num_heads_kv = fwd.num_heads_kv;
  params.head_dim = fwd.head_dim;
  params.head_dim_v = fwd.head_dim_v;
  if (packed) {
    check_rank(k, "k", 3, "(total_q, num_heads_kv, head_dim) with cu_seqlens_q");
    params.num_tokens = fwd.total_q;
    params.seqlen_new = fwd.seqlen_q;
    check_shape(k, "k", {fwd.total_q, fwd.num_heads_kv, fwd.head_dim});
    check_shape(v, "v", {fwd.total_q, fwd.num_heads_kv, fwd.head_dim_v});
  } else {
    check_rank(k, "k", 4, "(batch, seqlen_new, num_heads_kv, head_dim) without cu_seqlens_q");
    params.seqlen_new = k.size(1);
    params.num_tokens = fwd.batch * params.seqlen_new;
    check_shape(k, "k", {fwd.batch, params.seqlen_new, fwd.num_heads_kv, fwd.head_dim});
    check_shape(v, "v", {fwd.batch, params.seqlen_new, fwd.num_heads_kv, fwd.head_dim_v});
    params.k_stride_batch = k.stride(0);
    params.v_stride_batch = v.stride(0);
  }
  params.dtype = float_type(k, "k");
  params.cache_dtype = cache_type(k_cache, k, "k", params.dtype);
  check_dtype(v, "v", k.scalar_type());
  check_same_device(k, "k", k_cache);
  check_same_device(v, "v", k_cache);
  check_unit_last_stride(k, "k");
  check_unit_last_stride(v, "v");
  set_cache_scales<float>(params, params.cache_dtype, k_cache, paged.k_scale, paged.v_scale);
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.k_stride_token = k.stride(row);
  params.k_stride_head = k.stride(row + 1);
  params.v_stride_token = v.stride(row);
  params.v_stride_head = v.stride(row + 1);
  set_written_caches(params, k_cache, v_cache);
  params.page_size = fwd.page_size;
  params.num_pages = fwd.num_pages;
  params.block_table = fwd.block_table;
  params.block_table_stride = fwd.block_table_stride;
  params.max_pages_per_seq = paged.block_table ? paged.block_table->size(1) : fwd.num_pages > 0;
  params.cache_seqlens = fwd.seqused_k;
  params.cu_seqlens_q = fwd.cu_seqlens_q;
  params.batch = fwd.batch;
  params.num_heads_q = fwd.num_heads_q;
  params.out_dtype = fwd.dtype;
  return params;
}

ReshapeAndCacheParams make_reshape_and_cache_params(const Tensor& k, const Tensor& v,
                                                    const Tensor& k_cache, const Tensor& v_cache,
                                                    const Tensor& slot_mapping,
                                                    const std::optional<Tensor>& k_scale,
                                                    const std::optional<Tensor>& v_scale) {
  ReshapeAndCacheParams params{};
  check_rank(k, "k", 3, "(num_tokens, num_heads_kv, head_dim)");
  check_rank(v, "v", 3, "(num_tokens, num_heads_kv, head_dim_v)");
  check_rank(k_cache, "k_cache", 4, kPaged);
  check_rank(v_cache, "v_cache", 4, kPaged);
  params.dtype = float_type(k, "k");
  params.cache_dtype = cache_type(k_cache, k, "k", params.dtype);
  check_dtype(v, "v", k.scalar_type());
  check_dtype(v_cache, "v_cache", k_cache.scalar_type());
  params.num_tokens = k.size(0);
  params.num_heads_kv = k_cache.size(2);
  params.head_dim = k_cache.size(3);
  params.head_dim_v = v_cache.size(3);
  check_head_dim(params.head_dim, k_cache, "k_cache", "head_dim");
  check_head_dim(params.head_dim_v, v_cache, "v_cache", "head_dim_v");
  check_page_size(k_cache);
  params.page_size = k_cache.size(1);
  params.num_pages = k_cache.size(0);
  check_shape(v_cache, "v_cache",
              {params.num_pages, params.page_size, params.num_heads_kv, params.head_dim_v});
  check_shape(k, "k", {params.num_tokens, params.num_heads_kv, params.head_dim});
  check_shape(v, "v", {params.num_tokens, params.num_heads_kv, params.head_dim_v});
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long);
  check_shape(slot_mapping, "slot_mapping", {params.num_tokens});
  const std::pair<const char*, const Tensor*> tensors[] = {{"k", &k},
                                                           {"v", &v},
                                                           {"k_cache", &k_cache},
                                                           {"v_cache", &v_cache},
                                                           {"slot_mapping", &slot_mapping}};
  for (const auto& [name, tensor] : tensors) {
    check_unit_last_stride(*tensor, name);
    check_same_device(*tensor, name, k);
  }
  set_cache_scales<float>(params, params.cache_dtype, k_cache, k_scale, v_scale);
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  set_written_caches(params, k_cache, v_cache);
  params.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
  params.k_stride_token = k.stride(0);
  params.k_stride_head = k.stride(1);
  params.v_stride_token = v.stride(0);
  params.v_stride_head = v.stride(1);
  return params;
}

}  // namespace sink_attention::binding
