// dQ in float32 or float64: one tile of rows of one kv head against the keys that they see.
//
// Q and dO of the tile lie in shared memory. Of each block of 64 keys:
//
//     S = Q K^T      chunk by chunk of head_dim
//     dP = dO V^T    chunk by chunk of head_dim_v
//     dS             into shared memory
//     dQ += dS K     chunk by chunk of head_dim, sums in registers
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
  static constexpr int kRows = kBlockM / kThreadRows;  // of a thread
  static constexpr int kKeys = kBlockN / kThreadCols;
  static constexpr int kChunks = Tiles::kHeadDim / kChunkCols<Real>;
  using Stream = ChunkStream<Real, kBlockN, 3, KeySource<Real>>;
  using Scores = Real[kRows][kKeys];
  using Output = Real[kChunks][kRows][kVector<Real>];

  struct SharedStorage {
    Tile<Real, kBlockM, Tiles::kHeadDim> q;
    Tile<Real, kBlockM, Tiles::kHeadDim> dout;
    typename Stream::Buffers keys;
    Tile<Real, kBlockM, kBlockN> ds;
    RowFactsTable<Real, kBlockM> facts;
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
    const BlockPlace place = place_of_block(params, kernel_params.num_tiles);
    const PackGqa rows = pack_gqa(params, place.batch_idx, place.kv_head);
    const int row_begin = place.tile * kBlockM;
    if (row_begin >= rows.num_rows) return;

    const attention::Mask mask = attention::make_mask(params, rows.info);
    const int num_sink_tokens = static_cast<int>(mask.num_sink_tokens);
    const int row_end = static_cast<int>(attention::min_of(row_begin + kBlockM, rows.num_rows));
    const attention::KeySet visible =
        mask.visible_keys(rows.position(row_begin), rows.position(row_end - 1) + 1);
    const KeySource<Real> k =
        k_source<Real>(params, place.batch_idx, rows.info, place.kv_head, visible);
    const KeySource<Real> v =
        v_source<Real>(params, place.batch_idx, rows.info, place.kv_head, visible);
    const auto blocks = attention::blocks_of(visible, kBlockN);

    load_tile(storage.q,
              query_source<Real>(rows, params.q, params.q_stride_batch, params.q_stride_row,
                                 params.q_stride_head, params.head_dim),
              row_begin, 0);
    load_tile(storage.dout,
              query_source<Real>(rows, bwd.dout, bwd.dout_stride_batch, bwd.dout_stride_row,
                                 bwd.dout_stride_head, params.head_dim_v),
              row_begin, 0);
    storage.facts.fill(kernel_params, mask, rows, row_begin);
    Stream stream(storage.keys, k, v);
    stream.start(blocks);

    const ScoreScale<Real> scale = score_scale<Real>(params);
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
      // The first call's barrier also lets all threads read q, dout and the rows' facts, and write
      // ds, which the block of keys before was multiplied with.
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
        const RowFacts<Real> row = storage.facts.load(thread_y() + kThreadRows * i);
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
        // The first call's barrier also makes ds all threads' to read.
        const auto& chunk = stream.next();
        add_products(dq[c], storage.ds, chunk, depth);
      }
    }
    primitives::cp_async_wait<0>();  // of q and dout, where there was no key to wait for
    store_sums(bwd, rows, row_begin, dq, adds);
  }

  // Adds the sums to those of other keys, if there are any, and clears them.
  static SA_DEVICE void store_sums(const attention::FlashBwdParams& bwd, const PackGqa& rows,
                                   int row_begin, Output& dq, bool adds) {
    const bool in_vectors = is_aligned(bwd.dq, sizeof(Real), bwd.dq_stride_batch, bwd.dq_stride_row,
                                       bwd.dq_stride_head);
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = row_begin + thread_y() + kThreadRows * i;
      if (row >= rows.num_rows) continue;
      Real* dq_row = static_cast<Real*>(bwd.dq) +
                     rows.offset(row, bwd.dq_stride_batch, bwd.dq_stride_row, bwd.dq_stride_head);
      SA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        store_numbers(dq_row, c * kChunkCols<Real> + kVector<Real> * thread_x(),
                      static_cast<int>(bwd.fwd.head_dim), in_vectors, dq[c][i],
                      static_cast<Real>(bwd.fwd.softmax_scale), adds, Real(1));
      }
    }
    clear(dq);
  }
};

}  // namespace sink_attention::cuda::simt
