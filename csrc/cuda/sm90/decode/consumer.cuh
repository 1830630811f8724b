// A decode consumer warp: 16 rows, and its part of each block's keys.
#pragma once

#include "cuda/sm90/decode/operands.cuh"
#include "cuda/sm90/decode/params.h"
#include "cuda/sm90/decode/storage.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "cuda/tile/key_source.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/cta.h"

namespace sink_attention::cuda::sm90 {

// Stored: the element type of the cache. Element: that of the tensor cores' operands.
template <class Element, class Stored, class Storage, class Tiles>
struct DecodeConsumer {
  static constexpr bool kUpcasts = Storage::kUpcasts;
  static constexpr int kThreads = 32 * Tiles::kConsumerWarps;
  static constexpr int kBarrier = 1;  // named barrier of the consumers; 0 is the CTA's
  static constexpr bool kKeepsQueries = Tiles::kKeepsQueries;
  static constexpr int kTilesK = Tiles::kHeadDim / 16;
  using Scores = Accumulators<1, Tiles::kWarpKeys / 8>;
  using Out = Accumulators<1, Tiles::kHeadDimV / 8>;
  using PipelineState = typename Ring<Tiles::kStages>::PipelineState;
  // P is multiplied by each token's value scale, as a fraction of the largest scale so far, times
  // kMaxScaledP. So P fits into Float16 whatever the scales are.
  static constexpr float kMaxScaledP = 32768.0f;

  const DecodeKernelParams& kernel_params;
  Storage& storage;
  const KeyBlockRange& key_blocks;
  // Of the sequence. What follows from these is recomputed where it is needed, to save registers.
  int seqlen_q{};
  int seqlen_k{};
  int qhead_per_khead{};
  const int64_t* tree{};  // the sequence's part of the tree mask, or null
  int lane{};
  int warp_row{};  // first of this warp's 16 rows
  int warp_key{};  // first of this warp's keys in a block

  RowStates<1> states{};
  Out out{};                // times kMaxScaledP / max_value_scale, where tokens have value scales
  float max_value_scale{};  // the largest value scale so far

  // Loads Q into shared memory. All consumer warps call; `warp` is this one's index.
  SA_DEVICE void load_queries(const PackGqa& rows, int warp) {
    const attention::FlashFwdParams& params = kernel_params.attn;
    if constexpr (kUpcasts) {
      load_permuted_queries(storage.q, storage.q_descales, params, rows,
                            kernel_params.q_is_vectorised, warp, Tiles::kConsumerWarps);
    } else {
      load_tile<kThreads>(storage.q, static_cast<int>(params.head_dim),
                          kernel_params.q_is_vectorised, [&](int row) {
                            return row < rows.num_rows
                                       ? static_cast<const Element*>(params.q) +
                                             rows.offset(row, params.q_stride_batch,
                                                         params.q_stride_row, params.q_stride_head)
                                       : nullptr;
                          });
      primitives::cp_async_commit();
      primitives::cp_async_wait<0>();
    }
    primitives::sync_named(kBarrier, kThreads);
  }

  SA_DEVICE void start() {
    states.clear();
    out.clear();
    max_value_scale = 1e-30f;  // not 0, since it is a divisor
  }

  SA_DEVICE void run(const ScoreScale& scale) {
    const attention::Range unmasked = mask().keys_seen_by_all(0, seqlen_q);
    const int unmasked_begin =
        (static_cast<int>(unmasked.begin) + Tiles::kBlockN - 1) / Tiles::kBlockN;
    const int unmasked_end = static_cast<int>(attention::max_of(unmasked.end, 0)) / Tiles::kBlockN;
    float descale[2] = {1.0f, 1.0f};
    if constexpr (kUpcasts) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        descale[half] = primitives::load_shared(storage.q_descales + warp_row +
                                                accumulator_row(lane, 2 * half));
      }
    }
    OperandsA<1, kKeepsQueries ? kTilesK : 1> queries;
    if constexpr (kKeepsQueries) load_operands_a(queries, storage.q, warp_row, lane);

    PipelineState state;
    for (int idx = key_blocks.begin; idx < key_blocks.end; ++idx) {
      const int block = key_blocks.blocks.block(idx);
      storage.ring.wait_until_full(state);
      Scores s;
      s.clear();
      gemm_qk(s, queries, state.stage);
      if constexpr (kUpcasts) apply_key_scales(s, descale, state.stage);
      release(state);

      transform_scores(s, scale.form, scale.to_tanh);
      if (block < unmasked_begin || block >= unmasked_end) {
        const int first_key = block * Tiles::kBlockN + warp_key;
        if (tree == nullptr) {
          mask_scores(s, mask(), warp_row, qhead_per_khead, first_key);
        } else {
          mask_tree_scores(s, mask(), warp_row, qhead_per_khead, first_key);
        }
      }
      online_softmax_rescale(s, states, out, scale.softmax_scale_log2);

      storage.ring.wait_until_full(state);
      if constexpr (kUpcasts) {
        if (has_token_scales<true>()) apply_value_scales(s, state.stage);
      }
      gemm_pv(s, state.stage);
      release(state);
    }
  }

  // Stores states and outputs for the merge. The buffer overlays the ring, which no consumer may
  // read any more.
  SA_DEVICE void store_to_reduction(int part, float softmax_scale_log2) {
    auto& reduction_buffer = storage.reduction_buffer;
    const float factor = has_token_scales<true>() ? max_value_scale / kMaxScaledP : 1.0f;
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + accumulator_row(lane, 2 * half);
      const attention::RowState<float> state = states.whole(0, half, softmax_scale_log2);
      if (lane % 4 == 0) {
        primitives::store_shared(&reduction_buffer.state[part][row],
                                 primitives::Float2{state.max, state.sum});
      }
      float* elements = reduction_buffer.out[part][row];
      SA_UNROLL
      for (int n = 0; n < Out::kTilesN; n += 2) {
        const float (&left)[4] = out.c[0][n];
        const float (&right)[4] = out.c[0][n + 1];
        if constexpr (kUpcasts) {  // even and odd columns
          primitives::store_shared(
              reinterpret_cast<primitives::Float4*>(elements + 8 * n + lane % 4 * 4),
              primitives::Float4{left[2 * half] * factor, right[2 * half] * factor,
                                 left[2 * half + 1] * factor, right[2 * half + 1] * factor});
        } else {
          float* pair = elements + 8 * n + accumulator_col(lane, 0);
          primitives::store_shared(reinterpret_cast<primitives::Float2*>(pair),
                                   primitives::Float2{left[2 * half], left[2 * half + 1]});
          primitives::store_shared(reinterpret_cast<primitives::Float2*>(pair + 8),
                                   primitives::Float2{right[2 * half], right[2 * half + 1]});
        }
      }
    }
  }

 private:
  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(kernel_params.attn, seqlen_q, seqlen_k, tree);
  }
  template <bool kValues>
  SA_DEVICE bool has_token_scales() const {
    const attention::FlashFwdParams& params = kernel_params.attn;
    return kUpcasts && (kValues ? params.v_token_scales : params.k_token_scales) != nullptr;
  }

  // Frees a stage that this warp has read.
  SA_DEVICE void release(PipelineState& state) {
    primitives::sync_warp();
    if (lane == 0) primitives::mbarrier_arrive(&storage.ring.empty[state.stage]);
    state.advance();
  }

  // Returns `lane`, but makes the compiler recompute shared-memory addresses at each product
  // instead of keeping them in registers.
  static SA_DEVICE int rematerialise(int lane) {
    return primitives::optimisation_barrier(lane) & 31;
  }

  template <class Queries>
  SA_DEVICE void gemm_qk(Scores& s, const Queries& queries, int stage) {
    if constexpr (kUpcasts) {
      const auto& keys = storage.template tile<false>(stage);
      if constexpr (kKeepsQueries) {
        gemm_qk_upcast<Stored>(s, queries, warp_row, keys, warp_key, rematerialise(lane));
      } else {
        gemm_qk_upcast<Stored>(s, storage.q, warp_row, keys, warp_key, rematerialise(lane));
      }
    } else {
      const auto& keys = as_operands<Tiles::kHeadDim>(stage);
      if constexpr (kKeepsQueries) {
        gemm_abt(s, queries, keys, warp_key, rematerialise(lane));
      } else {
        gemm_abt(s, storage.q, warp_row, keys, warp_key, rematerialise(lane));
      }
    }
  }

  SA_DEVICE void gemm_pv(const Scores& p, int stage) {
    if constexpr (kUpcasts) {
      gemm_pv_upcast<Stored>(out, p, storage.template tile<true>(stage), warp_key,
                             rematerialise(lane));
    } else {
      gemm_rs(out, p, as_operands<Tiles::kHeadDimV>(stage), warp_key, rematerialise(lane));
    }
  }

  // A stage of 16-bit elements is an operand as it lies.
  template <int kCols>
  SA_DEVICE const SmemTile<Element, Tiles::kBlockN, kCols>& as_operands(int stage) {
    using Tile = SmemTile<Element, Tiles::kBlockN, kCols>;
    static_assert(2 * Tile::kSlabCols == StoredTile<Tiles::kBlockN, 2 * kCols>::kSlabBytes);
    return *reinterpret_cast<const Tile*>(storage.stages[stage].bytes);
  }

  // The scales of this thread's two columns of tile n.
  SA_DEVICE primitives::Float2 scales_of(int stage, int n) const {
    return primitives::load_shared(reinterpret_cast<const primitives::Float2*>(
        storage.scales[stage] + warp_key + 8 * n + accumulator_col(lane, 0)));
  }

  SA_DEVICE void apply_key_scales(Scores& s, const float (&descale)[2], int stage) const {
    SA_UNROLL
    for (int n = 0; n < Scores::kTilesN; ++n) {
      const primitives::Float2 scales =
          has_token_scales<false>() ? scales_of(stage, n) : primitives::Float2{1.0f, 1.0f};
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        s.c[0][n][2 * half] *= descale[half] * scales.x;
        s.c[0][n][2 * half + 1] *= descale[half] * scales.y;
      }
    }
  }

  SA_DEVICE void apply_value_scales(Scores& p, int stage) {
    primitives::Float2 scales[Scores::kTilesN];
    float largest = max_value_scale;
    SA_UNROLL
    for (int n = 0; n < Scores::kTilesN; ++n) {
      scales[n] = scales_of(stage, n);
      const float x = scales[n].x < 0 ? -scales[n].x : scales[n].x;
      const float y = scales[n].y < 0 ? -scales[n].y : scales[n].y;
      largest = x > largest ? x : largest;
      largest = y > largest ? y : largest;
    }
    largest = quad_max(largest);  // a quad's lanes have all of the warp's keys
    if (largest > max_value_scale) {
      const float factor = max_value_scale / largest;
      out.for_each([&](float& element) { element *= factor; });
      max_value_scale = largest;
    }
    const float factor = kMaxScaledP / max_value_scale;
    SA_UNROLL
    for (int n = 0; n < Scores::kTilesN; ++n) {
      SA_UNROLL
      for (int half = 0; half < 2; ++half) {
        p.c[0][n][2 * half] *= scales[n].x * factor;
        p.c[0][n][2 * half + 1] *= scales[n].y * factor;
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm90
