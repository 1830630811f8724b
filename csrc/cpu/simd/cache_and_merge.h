// The ops that touch each element once: merging partial results, writing a KV cache.
#pragma once

#include "attention/online_softmax.h"
#include "cpu/simd/banked_sum.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

namespace sink_attention::cpu::SA_ISA {

using attention::KvWriteParams;
using attention::MergeParams;

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
SA_INLINE float own_scale(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = attention::finite_magnitude(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return attention::row_scale<Stored>(largest);
}

// One head of one token, copied or quantised. token_scale: where a scale of the row's own goes, or
// null.
SA_INLINE void write_cache_row(const KvWriteParams& params, const void* source, void* destination,
                               int64_t dim, const float* scale, float* token_scale) {
  if (params.cache_dtype == params.dtype) {
    memcpy(destination, source, dim * attention::bytes_of(params.dtype));
    return;
  }
  alignas(64) float values[kMaxHeadDim];
  load_row(source, params.dtype, dim, 1.0f, values);
  float divisor;
  if (token_scale == nullptr) {
    divisor = *scale;
  } else {
    divisor = params.cache_dtype == DataType::kInt8 ? own_scale<Int8>(values, dim)
                                                    : own_scale<Float8E4M3>(values, dim);
    *token_scale = divisor;
  }
  for (int64_t i = 0; i < dim; ++i) values[i] /= divisor;
  store_row(values, dim, 1.0f, destination, params.cache_dtype);
}

// Neighbouring slots share a part: they share cache lines. Multiplicative hashing, so that no
// stride between sequences' slots sends all of them to one part.
SA_INLINE int64_t part_of(int64_t slot, int part_bits) {
  if (part_bits == 0) return 0;
  constexpr int kSlotBits = 4;
  return static_cast<int64_t>((static_cast<uint64_t>(slot >> kSlotBits) * 0x9E3779B97F4A7C15u) >>
                              (64 - part_bits));
}

// All heads of the tokens whose slots are in the part, in order: where tokens share a slot, the
// last one stays.
inline void write_cache(const KvWriteParams& params, const CacheTokens& tokens, int64_t part) {
  const auto k_scale = [&](int64_t head) {
    return params.k_scale == nullptr ? nullptr : params.k_scale + head * params.kv_scale_stride;
  };
  const auto v_scale = [&](int64_t head) {
    return params.v_scale == nullptr ? nullptr : params.v_scale + head * params.kv_scale_stride;
  };
  const int64_t num_slots = params.num_pages * params.page_size;
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = tokens.slots[token];
    if (slot < 0 || slot >= num_slots || part_of(slot, tokens.part_bits) != part) continue;
    const int64_t page = slot / params.page_size;
    const int64_t in_page = slot % params.page_size;
    const int64_t batch = token / tokens.tokens_per_row;
    const int64_t row = token % tokens.tokens_per_row;
    const int64_t k_offset = batch * tokens.k_stride_batch + row * params.k_stride_token;
    const int64_t v_offset = batch * tokens.v_stride_batch + row * params.v_stride_token;
    const int64_t k_cache_offset =
        page * params.k_cache_stride_page + in_page * params.k_cache_stride_slot;
    const int64_t v_cache_offset =
        page * params.v_cache_stride_page + in_page * params.v_cache_stride_slot;
    const int64_t k_scale_offset =
        page * params.k_scale_stride_page + in_page * params.k_scale_stride_slot;
    const int64_t v_scale_offset =
        page * params.v_scale_stride_page + in_page * params.v_scale_stride_slot;
    for (int64_t head = 0; head < params.num_heads_kv; ++head) {
      write_cache_row(
          params, element(params.k, params.dtype, k_offset + head * params.k_stride_head),
          element(params.k_cache, params.cache_dtype,
                  k_cache_offset + head * params.k_cache_stride_head),
          params.head_dim, k_scale(head),
          params.k_token_scales == nullptr
              ? nullptr
              : params.k_token_scales + k_scale_offset + head * params.k_scale_stride_head);
      write_cache_row(
          params, element(params.v, params.dtype, v_offset + head * params.v_stride_head),
          element(params.v_cache, params.cache_dtype,
                  v_cache_offset + head * params.v_cache_stride_head),
          params.head_dim_v, v_scale(head),
          params.v_token_scales == nullptr
              ? nullptr
              : params.v_token_scales + v_scale_offset + head * params.v_scale_stride_head);
    }
  }
}

}  // namespace sink_attention::cpu::SA_ISA
