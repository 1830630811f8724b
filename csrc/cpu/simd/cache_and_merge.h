// The ops that touch each number once: merging partial results, writing a KV cache.
#pragma once

#include "attention/online_softmax.h"
#include "cpu/simd/banked_sum.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/pack.h"

namespace sink_attention::cpu::SA_ISA {

using attention::MergeParams;
using attention::ReshapeAndCacheParams;

// Rows [begin, end) of [batch * seqlen * num_heads] in the order of out.
template <class Real>
void merge_rows(const MergeParams& params, int64_t begin, int64_t end) {
  const int64_t dim = params.head_dim;
  constexpr int64_t kChunk =
      kMaxHeadDim;                     // head_dim is not bounded here: rows are merged in pieces
  constexpr int64_t kPieceParts = 64;  // sums over more parts than these are banked
  alignas(64) Real sum[kChunk];
  alignas(64) Real total[kChunk];
  alignas(64) Real part[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row % params.num_heads;
    const int64_t token = row / params.num_heads;
    const int64_t lse_idx =
        (token / params.seqlen * params.num_heads + head) * params.seqlen + token % params.seqlen;
    const auto part_lse = [&](int64_t i) {
      const Real lse = static_cast<const Real*>(params.lses[i])[lse_idx];
      return lse == static_cast<Real>(INFINITY) ? -lse : lse;
    };
    Real sink = attention::negative_infinity<Real>();
    if (params.s_aux != nullptr) {
      load_row(element(params.s_aux, params.s_aux_dtype, head), params.s_aux_dtype, 1, Real(1),
               &sink);
    }
    // Weights are exp(lse_i - max); the sink joins the denominator as everywhere else.
    attention::RowState<Real> state{attention::negative_infinity<Real>(), Real(0)};
    Real nan{};
    for (int64_t i = 0; i < params.num_parts; ++i) {
      const Real lse = part_lse(i) * static_cast<Real>(attention::kLog2E);
      if (lse != lse) nan = lse;
      state.max = lse > state.max ? lse : state.max;
    }
    double sum_of_weights = 0;
    for (int64_t i = 0; i < params.num_parts; ++i) {
      sum_of_weights +=
          attention::rebase_factor(part_lse(i) * static_cast<Real>(attention::kLog2E), state.max);
    }
    state.sum = static_cast<Real>(sum_of_weights) + nan;
    const attention::RowResult<Real> result = attention::fold_sink(state, sink);
    for (int64_t first = 0; first < dim; first += kChunk) {
      const int64_t count = min_of(kChunk, dim - first);
      const int64_t padded = round_up(count, kLanes<Real>);
      bool was_banked = false;
      for (int64_t i = 0; i < padded; ++i) sum[i] = 0;
      for (int64_t p = 0; p < params.num_parts; ++p) {
        if (p > 0 && p % kPieceParts == 0) {
          if (!was_banked) memset(total, 0, padded * sizeof(Real));
          bank<Real>(total, sum, padded);
          was_banked = true;
        }
        const Real weight =
            attention::rebase_factor(part_lse(p) * static_cast<Real>(attention::kLog2E), state.max);
        if (weight == Real(0)) continue;  // an empty part may hold anything
        load_row(element(params.outs[p], params.dtype, row * dim + first), params.dtype, count,
                 Real(1), part);
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * part[i];
      }
      if (was_banked) bank<Real>(total, sum, padded);
      store_row(was_banked ? total : sum, count, result.scale,
                element(params.out, params.dtype, row * dim + first), params.dtype);
    }
    static_cast<Real*>(params.lse)[lse_idx] = result.lse;
  }
}

// The scale that a row is stored with where each has its own.
template <class Stored>
SA_INLINE float own_scale(const float* numbers, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = attention::finite_magnitude(numbers[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return attention::row_scale<Stored>(largest);
}

// All tokens of one kv head into the cache, in order: where tokens share a slot, the last one
// stays.
inline void cache_head(const ReshapeAndCacheParams& params, int64_t head) {
  alignas(64) float numbers[kMaxHeadDim];
  // token_scale: where a scale of the row's own goes, or null.
  const auto write_row = [&](const void* source, void* destination, int64_t dim,
                             const float* scales, float* token_scale) {
    if (params.cache_dtype == params.dtype) {
      memcpy(destination, source, dim * attention::bytes_of(params.dtype));
      return;
    }
    load_row(source, params.dtype, dim, 1.0f, numbers);
    float scale;
    if (token_scale == nullptr) {
      scale = scales[head * params.kv_scale_stride];
    } else {
      scale = params.cache_dtype == DataType::kInt8 ? own_scale<Int8>(numbers, dim)
                                                    : own_scale<Float8E4M3>(numbers, dim);
      *token_scale = scale;
    }
    for (int64_t i = 0; i < dim; ++i) numbers[i] /= scale;
    store_row(numbers, dim, 1.0f, destination, params.cache_dtype);
  };
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t page = slot / params.page_size;
    const int64_t in_page = slot % params.page_size;
    const auto place = [&](int64_t stride_page, int64_t stride_slot, int64_t stride_head) {
      return page * stride_page + in_page * stride_slot + head * stride_head;
    };
    const int64_t k_scale_place =
        place(params.k_scale_stride_page, params.k_scale_stride_slot, params.k_scale_stride_head);
    const int64_t v_scale_place =
        place(params.v_scale_stride_page, params.v_scale_stride_slot, params.v_scale_stride_head);
    write_row(element(params.k, params.dtype,
                      token * params.k_stride_token + head * params.k_stride_head),
              element(params.k_cache, params.cache_dtype,
                      place(params.k_cache_stride_page, params.k_cache_stride_slot,
                            params.k_cache_stride_head)),
              params.head_dim, params.k_scale,
              params.k_token_scales == nullptr ? nullptr : params.k_token_scales + k_scale_place);
    write_row(element(params.v, params.dtype,
                      token * params.v_stride_token + head * params.v_stride_head),
              element(params.v_cache, params.cache_dtype,
                      place(params.v_cache_stride_page, params.v_cache_stride_slot,
                            params.v_cache_stride_head)),
              params.head_dim_v, params.v_scale,
              params.v_token_scales == nullptr ? nullptr : params.v_token_scales + v_scale_place);
  }
}

}  // namespace sink_attention::cpu::SA_ISA
