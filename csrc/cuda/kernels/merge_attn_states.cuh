// Merges partial attention results into one, and folds the sink in:
//
//   lse = log(sum_p exp(lse_p) + exp(s_aux))     out = sum_p exp(lse_p - lse) * out_p
//
// A row is a (sequence position, head). lanes_per_row lanes of a warp share it. Lane i takes its
// 16-byte vectors i, i + lanes_per_row, ...; a vector is one element if an address is not aligned.
// Each lane computes the factors of all parts itself.
//
// Rows are counted in the order of lse, with positions innermost, so that the rows of a warp read
// neighbouring lse.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/element.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

constexpr int kMaxMergeParts = 64;  // of one launch: their pointers are part of its argument

struct MergeParts {
  // num_parts <= kMaxMergeParts. params.outs and params.lses are host memory: not read here.
  attention::MergeParams params;
  const void* outs[kMaxMergeParts];
  const void* lses[kMaxMergeParts];
  int lanes_per_row;  // a power of two, at most a warp
};

template <class Element, int kVectorElems>
struct MergeAttnStatesKernel {
  using Params = MergeParts;
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  struct alignas(kVectorElems * sizeof(Element)) Vector {
    Element element[kVectorElems];
  };
  struct Config {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
  };

  static SA_DEVICE void run(const Params& parts, char*) {
    const attention::MergeParams& params = parts.params;
    const int64_t thread =
        int64_t{primitives::block_idx().x} * Config::kThreads + primitives::thread_idx();
    const int64_t row = thread / parts.lanes_per_row;
    const int lane = static_cast<int>(thread % parts.lanes_per_row);
    const bool exists = row < params.batch * params.num_heads * params.seqlen;
    Real lse = Real(0);
    if (exists) lse = merge_row(parts, row, lane);
    // A part may be an earlier launch's result, in the same memory as this launch's. So lse is
    // written only after all lanes of the row have read it.
    primitives::sync_warp();
    if (exists && lane == 0) {
      primitives::store_global(static_cast<Real*>(params.lse) + row, lse);
    }
  }

  // Writes the lane's vectors of a row; returns the row's lse.
  static SA_DEVICE Real merge_row(const Params& parts, int64_t row, int lane) {
    const attention::MergeParams& params = parts.params;
    const int64_t position = row % params.seqlen;
    const int64_t head = row / params.seqlen % params.num_heads;
    const int64_t batch_idx = row / params.seqlen / params.num_heads;
    const int64_t out_row = (batch_idx * params.seqlen + position) * params.num_heads + head;
    const attention::RowState<Real> state = sum_factors(parts, row);
    const Real sink = params.s_aux == nullptr
                          ? attention::negative_infinity<Real>()
                          : load_element<Real>(params.s_aux, params.s_aux_dtype, head);
    const attention::RowResult<Real> result = attention::fold_sink(state, sink);
    const int num_vectors = static_cast<int>(params.head_dim) / kVectorElems;
    for (int vector = lane; vector < num_vectors; vector += parts.lanes_per_row) {
      merge_vector(parts, row, out_row * num_vectors + vector, state.max, result.scale);
    }
    return result.lse;
  }

  // A part's lse in base 2; -inf for an empty part in either convention.
  static SA_DEVICE Real part_lse(const Params& parts, int part, int64_t row) {
    const Real lse = primitives::load_global(static_cast<const Real*>(parts.lses[part]) + row);
    return lse == static_cast<Real>(INFINITY) ? -lse : lse * static_cast<Real>(attention::kLog2E);
  }

  // max: the largest lse of the parts, base 2. sum: the sum of exp2(lse_p - max). NaN propagates to
  // the sum.
  static SA_DEVICE attention::RowState<Real> sum_factors(const Params& parts, int64_t row) {
    const int num_parts = static_cast<int>(parts.params.num_parts);
    attention::RowState<Real> state{attention::negative_infinity<Real>(), Real(0)};
    for (int part = 0; part < num_parts; ++part) {
      const Real lse = part_lse(parts, part, row);
      if (lse > state.max) state.max = lse;
    }
    for (int part = 0; part < num_parts; ++part) {
      state.sum += attention::rebase_factor(part_lse(parts, part, row), state.max);
    }
    return state;
  }

  static SA_DEVICE void merge_vector(const Params& parts, int64_t row, int64_t vector_idx, Real max,
                                     Real scale) {
    Real sum[kVectorElems] = {};
    for (int part = 0; part < static_cast<int>(parts.params.num_parts); ++part) {
      const Real factor = attention::rebase_factor(part_lse(parts, part, row), max);
      if (factor == Real(0)) continue;  // an empty part may hold anything
      const Vector vector =
          primitives::load_global(static_cast<const Vector*>(parts.outs[part]) + vector_idx);
      SA_UNROLL
      for (int i = 0; i < kVectorElems; ++i) sum[i] += factor * to_real<Real>(vector.element[i]);
    }
    Vector merged;
    SA_UNROLL
    for (int i = 0; i < kVectorElems; ++i) {
      merged.element[i] = from_real<Element>(sum[i] * scale);
    }
    primitives::store_global(static_cast<Vector*>(parts.params.out) + vector_idx, merged);
  }
};

}  // namespace sink_attention::cuda
