// Cuts the rows into pieces, and starts the kernel.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "attention/paged_kv.h"
#include "cuda/backend.h"
#include "cuda/kernels/reshape_and_cache.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::ReshapeAndCacheParams;

// The largest power of two up to 16 that divides all of them.
int common_alignment(std::initializer_list<int64_t> values) {
  int64_t bits = 16;
  for (const int64_t value : values) bits |= value;
  return static_cast<int>(bits & -bits);
}

CacheSide make_side(const void* source, void* cache, const float* scale, float* token_scales,
                    int64_t dim) {
  CacheSide side{};
  side.source = static_cast<const char*>(source);
  side.cache = static_cast<char*>(cache);
  side.scale = scale;
  side.token_scales = token_scales;
  side.num_pieces = static_cast<int>(dim);  // of one number, until cut_into_pieces
  return side;
}

void cut_into_pieces(CacheSide& side, int64_t source_bytes, int64_t cache_bytes, bool quantizes) {
  for (int64_t* stride : {&side.source_stride_token, &side.source_stride_head}) {
    *stride *= source_bytes;
  }
  for (int64_t* stride :
       {&side.cache_stride_page, &side.cache_stride_slot, &side.cache_stride_head}) {
    *stride *= cache_bytes;
  }
  const int64_t dim = side.num_pieces;
  const int source_alignment =
      common_alignment({reinterpret_cast<intptr_t>(side.source), side.source_stride_token,
                        side.source_stride_head, dim * source_bytes});
  const int cache_alignment =
      common_alignment({reinterpret_cast<intptr_t>(side.cache), side.cache_stride_page,
                        side.cache_stride_slot, side.cache_stride_head, dim * cache_bytes});
  int64_t elems;
  if (!quantizes) {
    elems = std::min(source_alignment, cache_alignment) / source_bytes;
  } else {
    elems = source_alignment == 16 && cache_alignment >= 8 ? 8 : 1;
  }
  side.num_pieces = static_cast<int>(dim / elems);
  side.source_piece_bytes = static_cast<int>(elems * source_bytes);
  side.cache_piece_bytes = static_cast<int>(elems * cache_bytes);
  side.row_lanes = 1;
  while (side.row_lanes < std::min(side.num_pieces, primitives::kWarpSize)) side.row_lanes *= 2;
}

CacheWrite make_write(const ReshapeAndCacheParams& params) {
  CacheWrite write{};
  write.k =
      make_side(params.k, params.k_cache, params.k_scale, params.k_token_scales, params.head_dim);
  write.k.source_stride_token = params.k_stride_token;
  write.k.source_stride_head = params.k_stride_head;
  write.k.cache_stride_page = params.k_cache_stride_page;
  write.k.cache_stride_slot = params.k_cache_stride_slot;
  write.k.cache_stride_head = params.k_cache_stride_head;
  write.k.scale_stride_page = params.k_scale_stride_page;
  write.k.scale_stride_slot = params.k_scale_stride_slot;
  write.k.scale_stride_head = params.k_scale_stride_head;
  write.v =
      make_side(params.v, params.v_cache, params.v_scale, params.v_token_scales, params.head_dim_v);
  write.v.source_stride_token = params.v_stride_token;
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
  cut_into_pieces(write.k, source_bytes, cache_bytes, quantizes);
  cut_into_pieces(write.v, source_bytes, cache_bytes, quantizes);
  write.slot_mapping = params.slot_mapping;
  write.num_slots = params.num_pages * params.page_size;
  write.page_size = params.page_size;
  write.scale_stride = params.kv_scale_stride;
  write.num_tokens = static_cast<int>(params.num_tokens);
  write.num_heads_kv = static_cast<int>(params.num_heads_kv);
  // Few tokens: a block each. Many: blocks enough to fill a device, so that fewer of them look
  // through the slots of later tokens.
  constexpr int64_t kEnoughBlocks = 256;
  write.tokens_per_block = static_cast<int>(
      std::clamp<int64_t>(params.num_tokens / kEnoughBlocks, 1, kMaxTokensPerBlock));
  return write;
}

template <class Piece>
void start(const CacheWrite& write, Stream stream) {
  const int blocks = (write.num_tokens + write.tokens_per_block - 1) / write.tokens_per_block;
  primitives::launch<ReshapeAndCacheKernel<Piece>>(write, {blocks, 1, 1}, stream);
}

template <class Element>
void start_quantizing(const ReshapeAndCacheParams& params, const CacheWrite& write, Stream stream) {
  using attention::Float8E4M3;
  using attention::Int8;
  const bool int8 = params.cache_dtype == DataType::kInt8;
  if (params.k_token_scales != nullptr) {
    return int8 ? start<QuantizeRow<Element, Int8>>(write, stream)
                : start<QuantizeRow<Element, Float8E4M3>>(write, stream);
  }
  return int8 ? start<QuantizePiece<Element, Int8>>(write, stream)
              : start<QuantizePiece<Element, Float8E4M3>>(write, stream);
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.num_heads_kv == 0) return;
  if (params.num_tokens > INT32_MAX / 2)
    throw std::runtime_error("reshape_and_cache: more tokens than one launch can take");
  const CacheWrite write = make_write(params);
  if (params.cache_dtype == params.dtype) return start<CopyPiece>(write, stream);
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

}  // namespace sink_attention::cuda
