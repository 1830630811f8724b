// Merging partial results into one, and the sink into it:
//
//   lse = log(sum_p exp(lse_p) + exp(s_aux))     out = sum_p exp(lse_p - lse) * out_p
//
// A row (sequence position, head) is cut into pieces of 16 bytes (or single numbers, where an
// address does not allow that). It belongs to some lanes of one warp, which take its pieces in
// turns; each lane finds the weights of the parts for itself. Rows are counted in the order of lse,
// positions of one head after each other, so that a warp's rows read neighbouring lse.
#pragma once

#include "attention/online_softmax.h"
#include "cuda/device/element.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

constexpr int kMaxMergeParts = 64;  // of one launch: their pointers are part of its argument

struct MergeParts {
  attention::MergeParams params;  // num_parts <= kMaxMergeParts; outs and lses are not the
                                  // device's to read
  const void* outs[kMaxMergeParts];
  const void* lses[kMaxMergeParts];
  int lanes_per_row;  // a power of two, at most a warp
};

template <class Element, int kPieceElems>
struct MergeAttnStatesKernel {
  using Params = MergeParts;
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  struct alignas(kPieceElems * sizeof(Element)) Piece {
    Element number[kPieceElems];
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
    // One of the parts may be the result of an earlier launch, in the place of this one's: lse is
    // written when no lane of the row reads it any more.
    primitives::sync_warp();
    if (exists && lane == 0) {
      primitives::store_global(static_cast<Real*>(params.lse) + row, lse);
    }
  }

  // The lane's pieces of a row; returns the row's lse.
  static SA_DEVICE Real merge_row(const Params& parts, int64_t row, int lane) {
    const attention::MergeParams& params = parts.params;
    const int64_t position = row % params.seqlen;
    const int64_t head = row / params.seqlen % params.num_heads;
    const int64_t batch_idx = row / params.seqlen / params.num_heads;
    const int64_t out_row = (batch_idx * params.seqlen + position) * params.num_heads + head;
    const attention::RowState<Real> state = sum_weights(parts, row);
    const Real sink = params.s_aux == nullptr
                          ? attention::negative_infinity<Real>()
                          : load_element<Real>(params.s_aux, params.s_aux_dtype, head);
    const attention::RowResult<Real> result = attention::fold_sink(state, sink);
    const int num_pieces = static_cast<int>(params.head_dim) / kPieceElems;
    for (int piece = lane; piece < num_pieces; piece += parts.lanes_per_row) {
      merge_piece(parts, row, out_row * num_pieces + piece, state.max, result.scale);
    }
    return result.lse;
  }

  // A part's lse in base 2; -inf for an empty part in either convention.
  static SA_DEVICE Real part_lse(const Params& parts, int part, int64_t row) {
    const Real lse = primitives::load_global(static_cast<const Real*>(parts.lses[part]) + row);
    return lse == static_cast<Real>(INFINITY) ? -lse : lse * static_cast<Real>(attention::kLog2E);
  }

  // The largest lse of the parts, and the sum of their weights, exp2(lse_p - max). A NaN reaches
  // the sum.
  static SA_DEVICE attention::RowState<Real> sum_weights(const Params& parts, int64_t row) {
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

  static SA_DEVICE void merge_piece(const Params& parts, int64_t row, int64_t piece_idx, Real max,
                                    Real scale) {
    Real sum[kPieceElems] = {};
    for (int part = 0; part < static_cast<int>(parts.params.num_parts); ++part) {
      const Real weight = attention::rebase_factor(part_lse(parts, part, row), max);
      if (weight == Real(0)) continue;  // an empty part may hold anything
      const Piece piece =
          primitives::load_global(static_cast<const Piece*>(parts.outs[part]) + piece_idx);
      SA_UNROLL
      for (int i = 0; i < kPieceElems; ++i) sum[i] += weight * to_real<Real>(piece.number[i]);
    }
    Piece merged;
    SA_UNROLL
    for (int i = 0; i < kPieceElems; ++i) {
      merged.number[i] = from_real<Element>(sum[i] * scale);
    }
    primitives::store_global(static_cast<Piece*>(parts.params.out) + piece_idx, merged);
  }
};

}  // namespace sink_attention::cuda
