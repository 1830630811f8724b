// Describes both cache writes to their kernel: vectors, tokens, unused rows.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention/paged_kv.h"
#include "cuda/backend.h"
#include "cuda/kernels/reshape_and_cache.cuh"
#include "cuda/kernels/unused_rows.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::AppendKvParams;
using attention::DataType;
using attention::KvWriteParams;

CacheSide make_side(const void* source, void* cache, const float* scale, float* token_scales,
                    int64_t dim) {
  CacheSide side{};
  side.source = static_cast<const char*>(source);
  side.cache = static_cast<char*>(cache);
  side.scale = scale;
  side.token_scales = token_scales;
  side.num_vectors = static_cast<int>(dim);  // of one element, until cut_into_vectors
  return side;
}

void cut_into_vectors(CacheSide& side, int64_t source_bytes, int64_t cache_bytes, bool quantizes) {
  for (int64_t* stride :
       {&side.source_stride_batch, &side.source_stride_row, &side.source_stride_head}) {
    *stride *= source_bytes;
  }
  for (int64_t* stride :
       {&side.cache_stride_page, &side.cache_stride_slot, &side.cache_stride_head}) {
    *stride *= cache_bytes;
  }
  const int64_t dim = side.num_vectors;
  const int source_alignment =
      common_alignment({reinterpret_cast<intptr_t>(side.source), side.source_stride_batch,
                        side.source_stride_row, side.source_stride_head, dim * source_bytes});
  const int cache_alignment =
      common_alignment({reinterpret_cast<intptr_t>(side.cache), side.cache_stride_page,
                        side.cache_stride_slot, side.cache_stride_head, dim * cache_bytes});
  int64_t elems;
  if (!quantizes) {
    elems = std::min(source_alignment, cache_alignment) / source_bytes;
  } else {
    elems = source_alignment == 16 && cache_alignment >= 8 ? 8 : 1;
  }
  side.num_vectors = static_cast<int>(dim / elems);
  side.source_vector_bytes = static_cast<int>(elems * source_bytes);
  side.cache_vector_bytes = static_cast<int>(elems * cache_bytes);
  side.row_lanes = 1;
  while (side.row_lanes < std::min(side.num_vectors, primitives::kWarpSize)) side.row_lanes *= 2;
}

// Everything but the tokens. Batch strides count elements; 0: k and v have no batch dimension.
CacheWrite make_write(const KvWriteParams& params, int64_t k_stride_batch, int64_t v_stride_batch) {
  CacheWrite write{};
  write.k =
      make_side(params.k, params.k_cache, params.k_scale, params.k_token_scales, params.head_dim);
  write.k.source_stride_batch = k_stride_batch;
  write.k.source_stride_row = params.k_stride_token;
  write.k.source_stride_head = params.k_stride_head;
  write.k.cache_stride_page = params.k_cache_stride_page;
  write.k.cache_stride_slot = params.k_cache_stride_slot;
  write.k.cache_stride_head = params.k_cache_stride_head;
  write.k.scale_stride_page = params.k_scale_stride_page;
  write.k.scale_stride_slot = params.k_scale_stride_slot;
  write.k.scale_stride_head = params.k_scale_stride_head;
  write.v =
      make_side(params.v, params.v_cache, params.v_scale, params.v_token_scales, params.head_dim_v);
  write.v.source_stride_batch = v_stride_batch;
  write.v.source_stride_row = params.v_stride_token;
  write.v.source_stride_head = params.v_stride_head;
  write.v.cache_stride_page = params.v_cache_stride_page;
  write.v.cache_stride_slot = params.v_cache_stride_slot;
  write.v.cache_stride_head = params.v_cache_stride_head;
  write.v.scale_stride_page = params.v_scale_stride_page;
  write.v.scale_stride_slot = params.v_scale_stride_slot;
  write.v.scale_stride_head = params.v_scale_stride_head;
  const int64_t source_bytes = attention::bytes_of(params.dtype);
  const int64_t cache_bytes = attention::bytes_of(params.cache_dtype);
  const bool quantizes = params.cache_dtype != params.dtype;
  cut_into_vectors(write.k, source_bytes, cache_bytes, quantizes);
  cut_into_vectors(write.v, source_bytes, cache_bytes, quantizes);
  write.page_size = std::max<int64_t>(params.page_size, 1);  // divides: a cache may have no slots
  write.scale_stride = params.kv_scale_stride;
  write.num_heads_kv = static_cast<int>(params.num_heads_kv);
  write.tokens_per_block = rows_per_block(params.num_tokens, kMaxRowsPerBlock);
  write.tokens.sequences.num_rows = static_cast<int>(params.num_tokens);
  write.tokens.num_slots = params.num_pages * params.page_size;
  write.tokens.num_pages = params.num_pages;
  write.tokens.page_size = params.page_size;
  return write;
}

NewTokens appended(NewTokens tokens, const AppendKvParams& params) {
  tokens.sequences.cu_seqlens = params.cu_seqlens_q;
  tokens.sequences.batch = static_cast<int>(params.batch);
  tokens.sequences.max_seqlen = params.seqlen_new;
  tokens.cache_seqlens = params.cache_seqlens;
  tokens.block_table = params.block_table;
  tokens.seqused_k = params.seqused_k;
  tokens.page_table = params.page_table;
  tokens.block_table_stride = params.block_table_stride;
  tokens.capacity = std::min<int64_t>(params.max_pages_per_seq * params.page_size, INT32_MAX);
  return tokens;
}

template <class Vector>
void start(const CacheWrite& write, Stream stream) {
  const int of_tokens = blocks_of(write.tokens.sequences.num_rows, write.tokens_per_block);
  const int of_sequences = blocks_of(write.tokens.sequences.batch, kRowThreads);
  primitives::launch<WriteCacheKernel<Vector>>(write, {std::max(of_tokens, of_sequences), 1, 1},
                                               stream);
}

template <class Element>
void start_quantizing(const KvWriteParams& params, const CacheWrite& write, Stream stream) {
  using attention::Float8E4M3;
  using attention::Int8;
  const bool int8 = params.cache_dtype == DataType::kInt8;
  if (params.k_token_scales != nullptr) {
    return int8 ? start<QuantizeRow<Element, Int8>>(write, stream)
                : start<QuantizeRow<Element, Float8E4M3>>(write, stream);
  }
  return int8 ? start<QuantizeVector<Element, Int8>>(write, stream)
              : start<QuantizeVector<Element, Float8E4M3>>(write, stream);
}

void start(const KvWriteParams& params, const CacheWrite& write, Stream stream) {
  if (params.cache_dtype == params.dtype) return start<CopyVector>(write, stream);
  switch (params.dtype) {
    case DataType::kFloat64:
      return start_quantizing<double>(params, write, stream);
    case DataType::kFloat32:
      return start_quantizing<float>(params, write, stream);
    case DataType::kFloat16:
      return start_quantizing<attention::Float16>(params, write, stream);
    default:
      return start_quantizing<attention::BFloat16>(params, write, stream);
  }
}

void check_sizes(const KvWriteParams& params, int64_t elements, const char* function) {
  elements = std::max(elements, params.num_heads_kv * (params.head_dim + params.head_dim_v));
  if (params.num_tokens > INT32_MAX / 2 || elements > INT32_MAX / kMaxRowsPerBlock) {
    throw std::runtime_error(std::string(function) +
                             ": more tokens, or elements of a token, than one launch can take");
  }
}

}  // namespace

void reshape_and_cache(const attention::ReshapeAndCacheParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.num_heads_kv == 0) return;
  check_sizes(params, 0, "reshape_and_cache");
  CacheWrite write = make_write(params, 0, 0);
  write.tokens.slot_mapping = params.slot_mapping;
  write.tokens.deterministic = params.deterministic;
  start(params, write, stream);
}

void append_kv(const AppendKvParams& params, Stream stream) {
  check_sizes(params, params.num_heads_q * params.head_dim_v, "append_kv");
  const bool is_packed = params.cu_seqlens_q != nullptr;
  CacheWrite write = make_write(params, is_packed ? 0 : params.k_stride_batch,
                                is_packed ? 0 : params.v_stride_batch);
  write.tokens = appended(write.tokens, params);
  if (is_packed && params.out != nullptr) {
    write.out = zeroed_rows(params.out, params.out_dtype, params.out_stride_row,
                            params.out_stride_head, params.num_heads_q, params.head_dim_v);
    write.lse =
        filled_lse(params.lse, params.out_dtype, params.lse_stride_head, params.num_heads_q);
  }
  start(params, write, stream);
}

}  // namespace sink_attention::cuda
