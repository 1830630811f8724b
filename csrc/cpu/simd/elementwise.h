// The ops that touch each number once: merging partial results, writing a KV cache.
#pragma once

#include "attention/online_softmax.h"
#include "cpu/simd/banked_sum.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/pack.h"

namespace sink_attention::cpu::SA_ISA {

using attention::MergeProblem;
using attention::ReshapeAndCacheProblem;

// Rows [begin, end) of [batch * seqlen * num_heads] in the order of out.
template <class Real>
void merge_rows(const MergeProblem& problem, int64_t begin, int64_t end) {
  const int64_t dim = problem.head_dim;
  constexpr int64_t kChunk =
      kMaxHeadDim;                     // head_dim is not bounded here: rows are merged in pieces
  constexpr int64_t kPieceParts = 64;  // sums over more parts than these are banked
  alignas(64) Real sum[kChunk];
  alignas(64) Real total[kChunk];
  alignas(64) Real part[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row % problem.num_heads;
    const int64_t token = row / problem.num_heads;
    const int64_t lse_idx = (token / problem.seqlen * problem.num_heads + head) * problem.seqlen +
                            token % problem.seqlen;
    const auto part_lse = [&](int64_t i) {
      const Real lse = static_cast<const Real*>(problem.lses[i])[lse_idx];
      return lse == static_cast<Real>(INFINITY) ? -lse : lse;
    };
    Real sink = attention::negative_infinity<Real>();
    if (problem.s_aux != nullptr) {
      load_row(element(problem.s_aux, problem.s_aux_dtype, head), problem.s_aux_dtype, 1, Real(1),
               &sink);
    }
    // Weights are exp(lse_i - max); the sink joins the denominator as everywhere else.
    attention::RowState<Real> state{attention::negative_infinity<Real>(), Real(0)};
    Real nan{};
    for (int64_t i = 0; i < problem.num_parts; ++i) {
      const Real lse = part_lse(i) * static_cast<Real>(attention::kLog2E);
      if (lse != lse) nan = lse;
      state.max = lse > state.max ? lse : state.max;
    }
    double sum_of_weights = 0;
    for (int64_t i = 0; i < problem.num_parts; ++i) {
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
      for (int64_t p = 0; p < problem.num_parts; ++p) {
        if (p > 0 && p % kPieceParts == 0) {
          if (!was_banked) memset(total, 0, padded * sizeof(Real));
          bank<Real>(total, sum, padded);
          was_banked = true;
        }
        const Real weight =
            attention::rebase_factor(part_lse(p) * static_cast<Real>(attention::kLog2E), state.max);
        if (weight == Real(0)) continue;  // an empty part may hold anything
        load_row(element(problem.outs[p], problem.dtype, row * dim + first), problem.dtype, count,
                 Real(1), part);
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * part[i];
      }
      if (was_banked) bank<Real>(total, sum, padded);
      store_row(was_banked ? total : sum, count, result.scale,
                element(problem.out, problem.dtype, row * dim + first), problem.dtype);
    }
    static_cast<Real*>(problem.lse)[lse_idx] = result.lse;
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
inline void cache_head(const ReshapeAndCacheProblem& problem, int64_t head) {
  alignas(64) float numbers[kMaxHeadDim];
  // token_scale: where a scale of the row's own goes, or null.
  const auto write_row = [&](const void* source, void* destination, int64_t dim,
                             const float* scales, float* token_scale) {
    if (problem.cache_dtype == problem.dtype) {
      memcpy(destination, source, dim * attention::bytes_of(problem.dtype));
      return;
    }
    load_row(source, problem.dtype, dim, 1.0f, numbers);
    float scale;
    if (token_scale == nullptr) {
      scale = scales[head * problem.kv_scale_stride];
    } else {
      scale = problem.cache_dtype == DataType::kInt8 ? own_scale<Int8>(numbers, dim)
                                                     : own_scale<Float8E4M3>(numbers, dim);
      *token_scale = scale;
    }
    for (int64_t i = 0; i < dim; ++i) numbers[i] /= scale;
    store_row(numbers, dim, 1.0f, destination, problem.cache_dtype);
  };
  for (int64_t token = 0; token < problem.num_tokens; ++token) {
    const int64_t slot = problem.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t page = slot / problem.page_size;
    const int64_t in_page = slot % problem.page_size;
    const auto place = [&](int64_t stride_page, int64_t stride_slot, int64_t stride_head) {
      return page * stride_page + in_page * stride_slot + head * stride_head;
    };
    const int64_t k_scale_place = place(problem.k_scale_stride_page, problem.k_scale_stride_slot,
                                        problem.k_scale_stride_head);
    const int64_t v_scale_place = place(problem.v_scale_stride_page, problem.v_scale_stride_slot,
                                        problem.v_scale_stride_head);
    write_row(element(problem.k, problem.dtype,
                      token * problem.k_stride_token + head * problem.k_stride_head),
              element(problem.k_cache, problem.cache_dtype,
                      place(problem.k_cache_stride_page, problem.k_cache_stride_slot,
                            problem.k_cache_stride_head)),
              problem.head_dim, problem.k_scale,
              problem.k_token_scales == nullptr ? nullptr : problem.k_token_scales + k_scale_place);
    write_row(element(problem.v, problem.dtype,
                      token * problem.v_stride_token + head * problem.v_stride_head),
              element(problem.v_cache, problem.cache_dtype,
                      place(problem.v_cache_stride_page, problem.v_cache_stride_slot,
                            problem.v_cache_stride_head)),
              problem.head_dim_v, problem.v_scale,
              problem.v_token_scales == nullptr ? nullptr : problem.v_token_scales + v_scale_place);
  }
}

}  // namespace sink_attention::cpu::SA_ISA
