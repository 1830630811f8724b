// dQ in float32 or float64. A CTA has one row tile of one kv head, and visits its visible keys.
//
// Q and dO of the tile are in shared memory. For each block of 64 keys:
//
//     S = Q K^T      by chunks of head_dim
//     dP = dO V^T    by chunks of head_dim_v
//     dS             stored in shared memory
//     dQ += dS K     by chunks of head_dim; sums in registers
#pragma once

#include "cuda/simt/flash_bwd/config.h"
#include "cuda/simt/flash_bwd/differentiate.cuh"
#include "cuda/simt/load.cuh"

namespace sink_attention::cuda::simt {

template <class Tiles>
struct FlashBwdDqKernel {
  using Real = typename Tiles::Real;
  using Params = FlashBwdKernelParams<Real>;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kBlockN = Tiles::kBlockN;
  static constexpr int kRows = kBlockM / kThreadRows;  // rows and keys of a thread
  static constexpr int kKeys = kBlockN / kThreadCols;
  static constexpr int kChunks = Tiles::kHeadDim / kChunkCols<Real>;
  using Stream = ChunkStream<Real, kBlockN, 3, KvRowSource<Real>>;
  using Scores = Real[kRows][kKeys];
  using Output = Real[kChunks][kRows][kVector<Real>];

  struct SharedStorage {
    Tile<Real, kBlockM, Tiles::kHeadDim> q;
    Tile<Real, kBlockM, Tiles::kHeadDim> dout;
    typename Stream::Buffers keys;
    Tile<Real, kBlockM, kBlockN> ds;
    RowStatsTable<Real, kBlockM> row_stats;
  };
  struct Config {
    static constexpr int kThreads = simt::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };
  static_assert(Config::kSharedBytes <= 99 * 1024, "what compute capability 8.6 has for a block");

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashBwdParams& bwd = kernel_params.bwd;
    const attention::FlashFwdParams& params = bwd.fwd;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const TileCoord coord = tile_coord(params, kernel_params.num_tiles);
    const PackGqa rows = pack_gqa(params, coord.batch_idx, coord.kv_head);
    const int row_begin = coord.tile * kBlockM;
    if (row_begin >= rows.num_rows) return;

    const attention::Mask mask = attention::make_mask(params, rows.info);
    const int num_sink_tokens = static_cast<int>(mask.num_sink_tokens);
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
    load_rows(storage.dout,
              query_row_source<Real>(rows, bwd.dout, bwd.dout_stride_batch, bwd.dout_stride_row,
                                     bwd.dout_stride_head, params.head_dim_v),
              row_begin, 0);
    storage.row_stats.fill(kernel_params, mask, rows, row_begin);
    Stream stream(storage.keys, k, v);
    stream.start(blocks);

    const ScoreScaleOf<Real> scale = score_scale<Real>(params);
    Output dq = {};
    int sum = sum_of_block<Real>(blocks.block(0));
    bool adds = false;
    for (int idx = 0; idx < blocks.count(); ++idx) {
      if (sum_of_block<Real>(blocks.block(idx)) != sum) {
        store_sums(bwd, rows, row_begin, dq, adds);
        sum = sum_of_block<Real>(blocks.block(idx));
        adds = true;
      }
      const int first_key = blocks.block(idx) * kBlockN;
      Scores s = {};
      Scores dp = {};
      // The barrier in the first next() also makes q, dout and row_stats visible to all threads.
      // After it all threads have read the last block's ds, so that it may be overwritten.
      for (int c = 0; c < Stream::num_chunks(k); ++c) {
        const auto& chunk = stream.next();
        add_dots(s, storage.q, c * kChunkCols<Real>, chunk, chunk_depth<Real>(k.dim, c));
      }
      for (int c = 0; c < Stream::num_chunks(v); ++c) {
        const auto& chunk = stream.next();
        add_dots(dp, storage.dout, c * kChunkCols<Real>, chunk, chunk_depth<Real>(v.dim, c));
      }
      SA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const RowStats<Real> row = storage.row_stats.load(thread_y() + kThreadRows * i);
        SA_UNROLL
        for (int j = 0; j < kKeys; ++j) {
          const int key = first_key + thread_x() + kThreadCols * j;
          differentiate(s[i][j], dp[i][j], scale, row, key, num_sink_tokens);
        }
      }
      store_scores(dp, storage.ds);
      const int depth =
          static_cast<int>(attention::min_of(visible.window.end - first_key, kBlockN));
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= Stream::num_chunks(k)) break;
        // The barrier in the first next() also makes ds visible to all threads.
        const auto& chunk = stream.next();
        add_products(dq[c], storage.ds, chunk, depth);
      }
    }
    primitives::cp_async_wait<0>();  // for q and dout, if there was no key block
    store_sums(bwd, rows, row_begin, dq, adds);
  }

  // Stores the sums, or adds them to those of earlier keys if `adds`, and clears them.
  static SA_DEVICE void store_sums(const attention::FlashBwdParams& bwd, const PackGqa& rows,
                                   int row_begin, Output& dq, bool adds) {
    const bool is_vectorised = is_aligned(bwd.dq, sizeof(Real), bwd.dq_stride_batch,
                                          bwd.dq_stride_row, bwd.dq_stride_head);
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = row_begin + thread_y() + kThreadRows * i;
      if (row >= rows.num_rows) continue;
      Real* dq_row = static_cast<Real*>(bwd.dq) +
                     rows.offset(row, bwd.dq_stride_batch, bwd.dq_stride_row, bwd.dq_stride_head);
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        store_vector(dq_row, c * kChunkCols<Real> + kVector<Real> * thread_x(),
                     static_cast<int>(bwd.fwd.head_dim), is_vectorised, dq[c][i],
                     static_cast<Real>(bwd.fwd.softmax_scale), adds, Real(1));
      }
    }
    clear(dq);
  }
};

}  // namespace sink_attention::cuda::simt
