// The forward in float32 or float64: one row tile of one kv head against its visible keys.
//
// Rows are PackGQA rows (pack_gqa.cuh), so that all query heads of the kv head share each chunk of
// K and V. For each block of 64 keys:
//
//     S = Q K^T         by chunks of head_dim; sums in registers
//     online softmax    softcap, mask, running maximum; P stored in shared memory
//     O += P V          by chunks of head_dim_v; sums in registers
//
// Key blocks are counted from key 0. A block whose keys are all masked for a row does not change
// the row. So a row's result does not depend on its tile.
#pragma once

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "cuda/device/load_sink.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/flash_fwd/config.h"
#include "cuda/simt/load.cuh"
#include "cuda/simt/scores.cuh"
#include "cuda/simt/tile.cuh"
#include "primitives/warp.h"

namespace sink_attention::cuda::simt {

struct FlashFwdKernelParams {
  attention::FlashFwdParams attn;
  int num_tiles;  // row tiles of the longest sequence
};

template <class Tiles>
struct FlashFwdKernel {
  using Params = FlashFwdKernelParams;
  using Real = typename Tiles::Real;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kBlockN = Tiles::kBlockN;
  static constexpr int kRows = kBlockM / kThreadRows;  // rows and keys of a thread
  static constexpr int kKeys = kBlockN / kThreadCols;
  static constexpr int kChunks = Tiles::kHeadDim / kChunkCols<Real>;
  using Stream = ChunkStream<Real, kBlockN, 2, KvRowSource<Real>>;
  using Scores = Real[kRows][kKeys];
  using Output = Real[kChunks][kRows][kVector<Real>];

  struct SharedStorage {
    Tile<Real, kBlockM, Tiles::kHeadDim> q;
    typename Stream::Buffers keys;
    Tile<Real, kBlockM, kBlockN> p;
    KeyRange window[kBlockM];
    // Per thread: the maximum to which a row's earlier sums in global memory are scaled.
    Real stored_max[kRows][simt::kThreads];
  };
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };
  static_assert(Config::kSharedBytes <= 99 * 1024, "what compute capability 8.6 has for a block");

  // Running state of a thread's rows. `max` is the row's largest transformed score. `sum` is the
  // thread's part of the sum of P.
  struct SoftmaxStates {
    Real max[kRows];
    Real sum[kRows];
  };

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashFwdParams& params = kernel_params.attn;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const TileCoord coord = tile_coord(params, kernel_params.num_tiles);
    const PackGqa rows = pack_gqa(params, coord.batch_idx, coord.kv_head);
    const int row_begin = coord.tile * kBlockM;
    if (row_begin >= rows.num_rows) return;

    const attention::Mask mask = attention::make_mask(params, rows.info);
    const int row_end = static_cast<int>(attention::min_of(row_begin + kBlockM, rows.num_rows));
    const attention::KeySet visible =
        mask.visible_keys(rows.position(row_begin), rows.position(row_end - 1) + 1);
    const KvRowSource<Real> k =
        k_source<Real>(params, coord.batch_idx, rows.info, coord.kv_head, visible);
    const KvRowSource<Real> v =
        v_source<Real>(params, coord.batch_idx, rows.info, coord.kv_head, visible);
    const auto blocks = attention::blocks_of(visible, kBlockN);

    load_rows(storage.q,
              query_row_source<Real>(rows, params.q, params.q_stride_batch, params.q_stride_row,
                                     params.q_stride_head, params.head_dim),
              row_begin, 0);
    if (primitives::thread_idx() < kBlockM) {
      const int row = primitives::thread_idx();
      primitives::store_shared(&storage.window[row], window_keys(mask, rows, row_begin + row));
    }
    Stream stream(storage.keys, k, v);
    stream.start(blocks);

    const ScoreScaleOf<Real> scale = score_scale<Real>(params);
    SoftmaxStates states;
    Output out = {};
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      states.max[i] = attention::negative_infinity<Real>();
      states.sum[i] = Real(0);
    }
    // The shuffle tells the compiler that the number of rounds is uniform: the loop has shuffles.
    const int num_blocks = primitives::shfl(blocks.count(), 0);
    int sum = sum_of_block<Real>(blocks.block(0));
    bool adds = false;
    for (int idx = 0; idx < num_blocks; ++idx) {
      if (sum_of_block<Real>(blocks.block(idx)) != sum) {
        store_sums(params, storage, rows, row_begin, scale, states, out, adds);
        sum = sum_of_block<Real>(blocks.block(idx));
        adds = true;
      }
      const int first_key = blocks.block(idx) * kBlockN;
      Scores s = {};
      // The barrier in the first next() also makes q and window visible to all threads. After it
      // all threads have read the last block's P, so that it may be overwritten.
      for (int c = 0; c < Stream::num_chunks(k); ++c) {
        const auto& chunk = stream.next();
        add_dots(s, storage.q, c * kChunkCols<Real>, chunk, chunk_depth<Real>(k.dim, c));
      }
      softmax(s, storage, mask, rows, row_begin, first_key, scale, states, out);
      store_scores(s, storage.p);
      const int depth =
          static_cast<int>(attention::min_of(visible.window.end - first_key, kBlockN));
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= Stream::num_chunks(v)) break;
        // The barrier in the first next() also makes P visible to all threads.
        const auto& chunk = stream.next();
        add_products(out[c], storage.p, chunk, depth);
      }
    }
    primitives::cp_async_wait<0>();  // for q, if there was no key block
    store_results(params, storage, rows, row_begin, scale, states, out, adds);
  }

  // In place S -> P for keys from first_key on. Updates the states and rescales out.
  static SA_DEVICE void softmax(Scores& s, const SharedStorage& storage,
                                const attention::Mask& mask, const PackGqa& rows, int row_begin,
                                int first_key, const ScoreScaleOf<Real>& scale,
                                SoftmaxStates& states, Output& out) {
    constexpr Real kMasked = attention::negative_infinity<Real>();
    const int num_sink_tokens = static_cast<int>(mask.num_sink_tokens);
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int tile_row = thread_y() + kThreadRows * i;
      const KeyRange window = primitives::load_shared(&storage.window[tile_row]);
      SA_UNROLL
      for (int j = 0; j < kKeys; ++j) {
        const int key = first_key + thread_x() + kThreadCols * j;
        s[i][j] = window.contains(key, num_sink_tokens) ? transform(scale, s[i][j]) : kMasked;
      }
      if (mask.tree != nullptr && first_key + kBlockN > mask.context()) {
        mask_drafts(s[i], mask, rows, row_begin + tile_row, first_key);
      }
      const Real old_max = states.max[i];
      Real max = old_max;
      SA_UNROLL
      for (int j = 0; j < kKeys; ++j) {
        max = s[i][j] > max ? s[i][j] : max;
      }
      max = max_over_row(max);
      // The maximum is subtracted before scaling, so the largest score gives exactly 0. A row
      // without visible keys so far has max = -inf. Subtracting 0 then gives P = 0, not NaN.
      const Real base = max == kMasked ? Real(0) : max;
      const Real rescale = rebase(old_max, max, scale);
      Real sum = Real(0);  // of this block
      SA_UNROLL
      for (int j = 0; j < kKeys; ++j) {
        s[i][j] = std::exp2((s[i][j] - base) * scale.softmax_scale_log2);
        sum += s[i][j];
      }
      states.max[i] = max;
      states.sum[i] = states.sum[i] * rescale + sum;
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        SA_UNROLL
        for (int e = 0; e < kVector<Real>; ++e) out[c][i][e] *= rescale;
      }
    }
  }

  // The factor that rescales sums from an old maximum to a new, larger one.
  static SA_DEVICE Real rebase(Real old_max, Real max, const ScoreScaleOf<Real>& scale) {
    const Real base = max == attention::negative_infinity<Real>() ? Real(0) : max;
    return old_max == max ? Real(1) : std::exp2((old_max - base) * scale.softmax_scale_log2);
  }

  // Stores the output so far, or adds it to that of earlier keys if `adds`, and clears it.
  static SA_DEVICE void store_sums(const attention::FlashFwdParams& params, SharedStorage& storage,
                                   const PackGqa& rows, int row_begin,
                                   const ScoreScaleOf<Real>& scale, const SoftmaxStates& states,
                                   Output& out, bool adds) {
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Real* stored_max = &storage.stored_max[i][primitives::thread_idx()];
      const Real kept =
          adds ? rebase(primitives::load_shared(stored_max), states.max[i], scale) : Real(0);
      primitives::store_shared(stored_max, states.max[i]);
      store_row(params, rows, row_begin, i, out, Real(1), adds, kept);
    }
    clear(out);
  }

  static SA_DEVICE void store_row(const attention::FlashFwdParams& params, const PackGqa& rows,
                                  int row_begin, int i, const Output& out, Real factor, bool adds,
                                  Real kept) {
    const bool is_vectorised = is_aligned(params.out, sizeof(Real), params.out_stride_batch,
                                          params.out_stride_row, params.out_stride_head);
    const int row = row_begin + thread_y() + kThreadRows * i;
    if (row >= rows.num_rows) return;
    Real* out_row =
        static_cast<Real*>(params.out) +
        rows.offset(row, params.out_stride_batch, params.out_stride_row, params.out_stride_head);
    SA_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      store_vector(out_row, c * kChunkCols<Real> + kVector<Real> * thread_x(),
                   static_cast<int>(params.head_dim_v), is_vectorised, out[c][i], factor, adds,
                   kept);
    }
  }

  // Masks draft tokens that are not on a row's path, or outside its window on it.
  static SA_DEVICE void mask_drafts(Real (&scores)[kKeys], const attention::Mask& mask,
                                    const PackGqa& rows, int row, int first_key) {
    if (row >= rows.num_rows) return;  // all its keys are masked already
    const uint64_t drafts = mask.visible_drafts(rows.position(row));
    SA_UNROLL
    for (int j = 0; j < kKeys; ++j) {
      const int key = first_key + thread_x() + kThreadCols * j;
      const int draft = key - static_cast<int>(mask.context());
      const bool is_draft = draft >= 0 && draft < rows.info.seqlen_q;
      // Drafts beyond kMaxDraftTokens, in an invalid call, have no bit: they are masked.
      if (is_draft && (draft >= attention::kMaxDraftTokens || ((drafts >> draft) & 1) == 0)) {
        scores[j] = attention::negative_infinity<Real>();
      }
    }
  }

  static SA_DEVICE void store_results(const attention::FlashFwdParams& params,
                                      const SharedStorage& storage, const PackGqa& rows,
                                      int row_begin, const ScoreScaleOf<Real>& scale,
                                      const SoftmaxStates& states, const Output& out, bool adds) {
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Real sum = sum_over_row(states.sum[i]);  // by all lanes, also without a row
      const int row = row_begin + thread_y() + kThreadRows * i;
      if (row >= rows.num_rows) continue;
      const Real sink = load_sink<Real>(params, rows.head(row));
      const attention::RowResult<Real> result =
          attention::fold_sink<Real>({states.max[i] * scale.softmax_scale_log2, sum}, sink);
      Real kept = Real(0);
      if (adds) {
        const Real stored_max =
            primitives::load_shared(&storage.stored_max[i][primitives::thread_idx()]);
        kept = rebase(stored_max, states.max[i], scale) * result.scale;
      }
      store_row(params, rows, row_begin, i, out, result.scale, adds, kept);
      if (thread_x() == 0) {
        primitives::store_global(
            static_cast<Real*>(params.lse) +
                rows.lse_offset(row, params.lse_stride_batch, params.lse_stride_head),
            result.lse);
      }
    }
  }
};

}  // namespace sink_attention::cuda::simt
