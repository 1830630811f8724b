// dK and dV in float32 or float64. A CTA has one tile of keys of one kv head, and visits the query
// rows that see some of them.
//
// K and V of the tile are in shared memory. Scores are transposed: keys are rows. For each block of
// 64 PackGQA rows:
//
//     S^T = K Q^T      by chunks of head_dim
//     P^T              stored in shared memory
//     dP^T = V dO^T    by chunks of head_dim_v
//     dV += P^T dO     with the same chunks of dO; sums in registers
//     dS^T             stored in shared memory, over P^T
//     dK += dS^T Q     by chunks of head_dim; sums in registers
#pragma once

#include "cuda/simt/flash_bwd/config.h"
#include "cuda/simt/flash_bwd/differentiate.cuh"
#include "cuda/simt/load.cuh"
#include "primitives/warp.h"

namespace sink_attention::cuda::simt {

template <class Tiles>
struct FlashBwdDkDvKernel {
  using Real = typename Tiles::Real;
  using Params = FlashBwdKernelParams<Real>;
  static constexpr int kBlockM = Tiles::kBlockM;       // keys
  static constexpr int kBlockN = Tiles::kBlockN;       // query rows
  static constexpr int kKeys = kBlockM / kThreadRows;  // keys and rows of a thread
  static constexpr int kRows = kBlockN / kThreadCols;
  static constexpr int kChunks = Tiles::kHeadDim / kChunkCols<Real>;
  using Stream = ChunkStream<Real, kBlockN, 3, QueryRowSource<Real>>;
  using Scores = Real[kKeys][kRows];
  using Output = Real[kChunks][kKeys][kVector<Real>];

  struct SharedStorage {
    Tile<Real, kBlockM, Tiles::kHeadDim> k;
    Tile<Real, kBlockM, Tiles::kHeadDim> v;
    typename Stream::Buffers queries;
    Tile<Real, kBlockM, kBlockN> p;  // P^T, then dS^T
    RowStatsTable<Real, kBlockN> row_stats;
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
    const int key_begin = coord.tile * kBlockM;
    const int key_end =
        static_cast<int>(attention::min_of(key_begin + kBlockM, rows.info.seqlen_k));
    if (key_begin >= key_end) return;

    const attention::Mask mask = attention::make_mask(params, rows.info);
    const int num_sink_tokens = static_cast<int>(mask.num_sink_tokens);
    const attention::Range queries = mask.visible_queries(key_begin, key_end);
    const int first_row = static_cast<int>(queries.begin) * rows.qhead_per_khead;
    const int last_row = static_cast<int>(queries.end) * rows.qhead_per_khead;
    // The shuffles tell the compiler that the number of rounds is uniform: the loop has a
    // sync_warp.
    const int block_begin = primitives::shfl(first_row / kBlockN, 0);
    const int block_end = primitives::shfl(
        first_row < last_row ? (last_row + kBlockN - 1) / kBlockN : block_begin, 0);
    const QueryRowSource<Real> q =
        query_row_source<Real>(rows, params.q, params.q_stride_batch, params.q_stride_row,
                               params.q_stride_head, params.head_dim);
    const QueryRowSource<Real> dout =
        query_row_source<Real>(rows, bwd.dout, bwd.dout_stride_batch, bwd.dout_stride_row,
                               bwd.dout_stride_head, params.head_dim_v);

    const attention::KeySet readable{0, {key_begin, key_end}};
    load_rows(storage.k,
              k_source<Real>(params, coord.batch_idx, rows.info, coord.kv_head, readable),
              key_begin, 0);
    load_rows(storage.v,
              v_source<Real>(params, coord.batch_idx, rows.info, coord.kv_head, readable),
              key_begin, 0);
    Stream stream(storage.queries, q, dout);
    stream.start({0, block_begin, block_end});

    const ScoreScaleOf<Real> scale = score_scale<Real>(params);
    Output dk = {};
    Output dv = {};
    bool adds = false;
    for (int block = block_begin; block < block_end; ++block) {
      if (block > block_begin && sum_of_block<Real>(block) != sum_of_block<Real>(block - 1)) {
        store_sums(bwd, rows, key_begin, key_end, dk, dv, adds);
        adds = true;
      }
      // Hazard: the last block's row_stats were read before the barriers of its last pass over q.
      storage.row_stats.fill(kernel_params, mask, rows, block * kBlockN);
      Scores s = {};
      Scores dp = {};
      // The barrier in the first next() also makes k, v and row_stats visible to all threads. After
      // it all threads have read the last block's dS^T, so that P^T may overwrite it.
      for (int c = 0; c < Stream::num_chunks(q); ++c) {
        const auto& chunk = stream.next();
        add_dots(s, storage.k, c * kChunkCols<Real>, chunk, chunk_depth<Real>(q.dim, c));
      }
      const int first_key = key_begin + thread_y();
      store_p(s, storage, first_key, num_sink_tokens, scale);
      const int depth =
          static_cast<int>(attention::min_of(rows.num_rows - block * kBlockN, kBlockN));
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= Stream::num_chunks(dout)) break;
        // The barrier in the first next() also makes P^T visible to all threads.
        const auto& chunk = stream.next();
        // In float32 dV is summed before dP, which then reuses its registers.
        constexpr bool kSumsFirst = sizeof(Real) == 4;
        if constexpr (kSumsFirst) add_products(dv[c], storage.p, chunk, depth);
        add_dots(dp, storage.v, c * kChunkCols<Real>, chunk, chunk_depth<Real>(dout.dim, c));
        if constexpr (!kSumsFirst) add_products(dv[c], storage.p, chunk, depth);
      }
      // Only the half warp that owns a row of P^T reads it, so a warp barrier is enough before dS^T
      // overwrites it.
      primitives::sync_warp();
      SA_UNROLL
      for (int j = 0; j < kRows; ++j) {
        const RowStats<Real> row = storage.row_stats.load(thread_x() + kThreadCols * j);
        SA_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          differentiate(s[i][j], dp[i][j], scale, row, first_key + kThreadRows * i,
                        num_sink_tokens);
        }
      }
      store_scores(dp, storage.p);
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= Stream::num_chunks(q)) break;
        // The barrier in the first next() also makes dS^T visible to all threads.
        const auto& chunk = stream.next();
        add_products(dk[c], storage.p, chunk, depth);
      }
    }
    primitives::cp_async_wait<0>();  // for k and v, if no row sees them

    store_sums(bwd, rows, key_begin, key_end, dk, dv, adds);
  }

  // Stores the sums, or adds them to those of earlier rows if `adds`, and clears them.
  static SA_DEVICE void store_sums(const attention::FlashBwdParams& bwd, const PackGqa& rows,
                                   int key_begin, int key_end, Output& dk, Output& dv, bool adds) {
    store_gradient(static_cast<Real*>(bwd.dk), rows, key_begin, key_end, bwd.dk_stride_batch,
                   bwd.dk_stride_row, bwd.dk_stride_head, bwd.fwd.head_dim, dk,
                   static_cast<Real>(bwd.fwd.softmax_scale), adds);
    store_gradient(static_cast<Real*>(bwd.dv), rows, key_begin, key_end, bwd.dv_stride_batch,
                   bwd.dv_stride_row, bwd.dv_stride_head, bwd.fwd.head_dim_v, dv, Real(1), adds);
    clear(dk);
    clear(dv);
  }

  // Stores P^T in shared memory. The scores are kept, and P is recomputed for dS. That costs an
  // exponential and saves the registers of a second matrix.
  static SA_DEVICE void store_p(const Scores& s, SharedStorage& storage, int first_key,
                                int num_sink_tokens, const ScoreScaleOf<Real>& scale) {
    Scores p;
    SA_UNROLL
    for (int j = 0; j < kRows; ++j) {
      const RowStats<Real> row = storage.row_stats.load(thread_x() + kThreadCols * j);
      SA_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        Real unused = Real(0);
        p[i][j] = s[i][j];
        differentiate(p[i][j], unused, scale, row, first_key + kThreadRows * i, num_sink_tokens);
      }
    }
    store_scores(p, storage.p);
  }

  static SA_DEVICE void store_gradient(Real* gradient, const PackGqa& rows, int key_begin,
                                       int key_end, int64_t stride_batch, int64_t stride_row,
                                       int64_t stride_head, int64_t dim, const Output& sums,
                                       Real factor, bool adds) {
    const bool is_vectorised =
        is_aligned(gradient, sizeof(Real), stride_batch, stride_row, stride_head);
    SA_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      const int key = key_begin + thread_y() + kThreadRows * i;
      if (key >= key_end) continue;
      Real* row = gradient + rows.info.k_batch * stride_batch +
                  (rows.info.k_row + key) * stride_row + rows.kv_head * stride_head;
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        store_vector(row, c * kChunkCols<Real> + kVector<Real> * thread_x(), static_cast<int>(dim),
                     is_vectorised, sums[c][i], factor, adds, Real(1));
      }
    }
  }
};

}  // namespace sink_attention::cuda::simt
