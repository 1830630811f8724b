// The forward: one row tile of one kv head against its visible keys.
//
// CTA (x, y): x is the work tile in the order of device/block_order.h, y the split of its keys.
// Under a causal mask the last row tiles have the most keys and start first. Rows are PackGQA rows
// (pack_gqa.cuh).
//
// The pipeline has n = kStages buffers each of K and V. For each key block j:
//
//     wait for K j,  barrier        start the copy of V j + n - 1     S = Q K^T
//     wait for V j,  barrier        start the copy of K j + n         online softmax,  O += P V
//
// A copy overwrites a buffer that all warps have read before the preceding barrier. cp.async groups
// are committed in the order K 0, V 0, K 1, V 1, ... So at each wait 2 (n - 1) of them stay in
// flight: 48 KB a CTA for decode at head_dim 64 (n = 4, 64 keys), and 56 KB after the next copy is
// started.
#pragma once

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/paged_kv.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm80/flash_fwd/config.h"
#include "cuda/sm80/flash_fwd/load_keys.cuh"
#include "cuda/sm80/flash_fwd/params.h"
#include "cuda/sm80/flash_fwd/results.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "primitives/cta.h"

namespace sink_attention::cuda::sm80 {

template <class Element_, class Tiles>
struct FlashFwdKernel {
  using Element = Element_;
  using Params = FlashFwdKernelParams;
  using QTile = SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDim>;
  using KTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDim>;
  using VTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDimV>;
  static constexpr int kThreads = Tiles::kThreads;
  static constexpr int kTilesM = Tiles::kTilesM;
  static constexpr int kTilesV = Tiles::kHeadDimV / 8;
  using Scores = Accumulators<kTilesM, Tiles::kWarpKeys / 8>;
  using Out = Accumulators<kTilesM, kTilesV>;

  struct Pipeline {
    QTile q;
    KTile k[Tiles::kStages];
    VTile v[Tiles::kStages];
  };
  using Results = FlashFwdResults<Element, Tiles>;
  // What all threads need once per key block. It is in shared memory, since the accumulators of
  // head_dim 128 leave no registers for it.
  struct WorkTileInfo {
    const char* k_base;
    const char* v_base;
    const int32_t* pages;
    const int64_t* tree;  // the sequence's part of the tree mask, or null
    int sink_end;         // keys [0, sink_end) and [key_begin, key_end) may be loaded
    const float* k_scales;
    const float* v_scales;
    int key_begin;
    int key_end;
    attention::BlockList<int> blocks;
    int seqlen_q;
    int seqlen_k;
    int row_begin;
    int qhead_per_khead;
    int unmasked_begin;  // key blocks [unmasked_begin, unmasked_end) need no mask
    int unmasked_end;
    ScoreScale scale;
  };
  struct SharedStorage {
    union {  // after the last key block, the results overwrite the pipeline
      Pipeline pipeline;
      typename Results::Storage results;
    };
    WorkTileInfo work_tile;
  };
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(SharedStorage));
  };
  static_assert(Config::kSharedBytes <= 99 * 1024, "what compute capability 8.6 has for a block");

  // The work tile of a CTA.
  struct WorkTileCoord {
    int batch_idx;
    int kv_head;
    int split;
    int row_begin;
  };
  static SA_DEVICE WorkTileCoord work_tile_coord(const Params& kernel_params, int x, int y) {
    const BlockCoord block = block_coord(kernel_params.order, x);
    const int tile = kernel_params.order.blocks_per_pair - 1 - block.tile_idx;
    return {block.batch_idx, block.kv_head, y, tile * Tiles::kBlockM};
  }

  // The CTA's part of the tile's list of key blocks: indices [begin, end).
  struct KeyBlockRange {
    int begin;
    int end;
  };
  static SA_DEVICE KeyBlockRange split_range(const attention::BlockList<int>& blocks, int split,
                                             int num_splits) {
    const int count = blocks.count();
    return {count * split / num_splits, count * (split + 1) / num_splits};
  }

  static SA_DEVICE void store_work_tile(WorkTileInfo& stored, const WorkTileInfo& work_tile) {
    using primitives::store_shared;
    store_shared(&stored.k_base, work_tile.k_base);
    store_shared(&stored.v_base, work_tile.v_base);
    store_shared(&stored.pages, work_tile.pages);
    store_shared(&stored.tree, work_tile.tree);
    store_shared(&stored.sink_end, work_tile.sink_end);
    store_shared(&stored.k_scales, work_tile.k_scales);
    store_shared(&stored.v_scales, work_tile.v_scales);
    store_shared(&stored.key_begin, work_tile.key_begin);
    store_shared(&stored.key_end, work_tile.key_end);
    store_shared(&stored.blocks.sink_end, work_tile.blocks.sink_end);
    store_shared(&stored.blocks.begin, work_tile.blocks.begin);
    store_shared(&stored.blocks.end, work_tile.blocks.end);
    store_shared(&stored.seqlen_q, work_tile.seqlen_q);
    store_shared(&stored.seqlen_k, work_tile.seqlen_k);
    store_shared(&stored.row_begin, work_tile.row_begin);
    store_shared(&stored.qhead_per_khead, work_tile.qhead_per_khead);
    store_shared(&stored.unmasked_begin, work_tile.unmasked_begin);
    store_shared(&stored.unmasked_end, work_tile.unmasked_end);
    store_shared(&stored.scale.softmax_scale_log2, work_tile.scale.softmax_scale_log2);
    store_shared(&stored.scale.to_tanh, work_tile.scale.to_tanh);
    store_shared(&stored.scale.form, work_tile.scale.form);
  }
  template <bool kValues>
  static SA_DEVICE KeySource<kValues> stored_source(const attention::FlashFwdParams& params,
                                                    const WorkTileInfo& work_tile) {
    using primitives::load_shared;
    return {params,
            load_shared(kValues ? &work_tile.v_base : &work_tile.k_base),
            load_shared(&work_tile.pages),
            load_shared(kValues ? &work_tile.v_scales : &work_tile.k_scales),
            load_shared(&work_tile.sink_end),
            load_shared(&work_tile.key_begin),
            load_shared(&work_tile.key_end)};
  }
  static SA_DEVICE attention::BlockList<int> stored_blocks(const WorkTileInfo& work_tile) {
    using primitives::load_shared;
    return {load_shared(&work_tile.blocks.sink_end), load_shared(&work_tile.blocks.begin),
            load_shared(&work_tile.blocks.end)};
  }

  // Starts the copy of key block `idx` of K or V, if it exists, and commits its cp.async group.
  template <bool kValues, class Tile>
  static SA_DEVICE void load_block(Tile* stages, const KeySource<kValues>& source,
                                   const attention::BlockList<int>& blocks, int idx,
                                   const KeyBlockRange& range, bool is_vectorised) {
    if (idx < range.end) {
      load_keys<kThreads>(stages[(idx - range.begin) % Tiles::kStages], source,
                          blocks.block(idx) * Tiles::kBlockN, is_vectorised);
    }
    primitives::cp_async_commit();
  }

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashFwdParams& params = kernel_params.attn;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    Pipeline& pipeline = storage.pipeline;
    const WorkTileCoord coord =
        work_tile_coord(kernel_params, primitives::block_idx().x, primitives::block_idx().y);
    const int batch_idx = coord.batch_idx;
    const int kv_head = coord.kv_head;
    const int row_begin = coord.row_begin;
    const PackGqa rows = pack_gqa(params, batch_idx, kv_head);
    if (row_begin >= rows.num_rows) return;

    const int warp_m = primitives::warp_idx() % Tiles::kWarpsM;
    const int warp_n = primitives::warp_idx() / Tiles::kWarpsM;
    const int warp_row = warp_m * 16 * kTilesM;
    const int q_begin = rows.position(row_begin);
    const int last_row = attention::min_of(row_begin + Tiles::kBlockM, rows.num_rows) - 1;
    const int q_end = rows.position(last_row) + 1;
    const attention::Mask mask = attention::make_mask(params, rows.info);
    const attention::KeySet visible = mask.visible_keys(q_begin, q_end);
    const auto blocks = attention::blocks_of(visible, Tiles::kBlockN);
    const KeyBlockRange range = split_range(blocks, coord.split, kernel_params.num_splits);
    const auto keys = key_source<false>(params, batch_idx, kv_head, rows.info, visible);
    const auto values = key_source<true>(params, batch_idx, kv_head, rows.info, visible);

    if (primitives::thread_idx() == 0) {
      constexpr int kBlockN = Tiles::kBlockN;
      WorkTileInfo work_tile{};
      work_tile.k_base = keys.base;
      work_tile.v_base = values.base;
      work_tile.pages = keys.pages;
      work_tile.tree = mask.tree;
      work_tile.sink_end = keys.sink_end;
      work_tile.k_scales = keys.scales;
      work_tile.v_scales = values.scales;
      work_tile.key_begin = keys.begin;
      work_tile.key_end = keys.end;
      work_tile.blocks = blocks;
      work_tile.seqlen_q = static_cast<int>(rows.info.seqlen_q);
      work_tile.seqlen_k = static_cast<int>(rows.info.seqlen_k);
      work_tile.row_begin = row_begin;
      work_tile.qhead_per_khead = rows.qhead_per_khead;
      const attention::Range unmasked = mask.keys_seen_by_all(q_begin, q_end);
      work_tile.unmasked_begin = (static_cast<int>(unmasked.begin) + kBlockN - 1) / kBlockN;
      work_tile.unmasked_end = static_cast<int>(attention::max_of(unmasked.end, 0)) / kBlockN;
      work_tile.scale = kernel_params.scale.times(cache_scale(params.k_scale, params, kv_head));
      store_work_tile(storage.work_tile, work_tile);
    }

    // Q is part of the first cp.async group.
    load_tile<kThreads>(pipeline.q, static_cast<int>(params.head_dim),
                        kernel_params.q_is_vectorised, [&](int row) {
                          const int gqa_row = row_begin + row;
                          return gqa_row < rows.num_rows
                                     ? static_cast<const Element*>(params.q) +
                                           rows.offset(gqa_row, params.q_stride_batch,
                                                       params.q_stride_row, params.q_stride_head)
                                     : nullptr;
                        });
    SA_UNROLL
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      load_block(pipeline.k, keys, blocks, range.begin + stage, range,
                 kernel_params.k_is_vectorised);
      if (stage == Tiles::kStages - 1) break;
      load_block(pipeline.v, values, blocks, range.begin + stage, range,
                 kernel_params.v_is_vectorised);
    }

    RowStates<kTilesM> states;
    states.clear();
    Out out;
    out.clear();

    for (int idx = range.begin; idx < range.end; ++idx) {
      const int stage = (idx - range.begin) % Tiles::kStages;
      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // K of this block has arrived; all warps have read the last V
      load_block(pipeline.v, stored_source<true>(params, storage.work_tile),
                 stored_blocks(storage.work_tile), idx + Tiles::kStages - 1, range,
                 kernel_params.v_is_vectorised);

      Scores s;
      s.clear();
      gemm_abt(s, pipeline.q, warp_row, pipeline.k[stage], warp_n * Tiles::kWarpKeys,
               primitives::optimisation_barrier(primitives::lane_idx()));

      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // V of this block has arrived; all warps have read its K
      load_block(pipeline.k, stored_source<false>(params, storage.work_tile),
                 stored_blocks(storage.work_tile), idx + Tiles::kStages, range,
                 kernel_params.k_is_vectorised);

      const WorkTileInfo& work_tile = storage.work_tile;
      using primitives::load_shared;
      transform_scores(s, load_shared(&work_tile.scale.form),
                       load_shared(&work_tile.scale.to_tanh));
      const int block = stored_blocks(work_tile).block(idx);
      if (block < load_shared(&work_tile.unmasked_begin) ||
          block >= load_shared(&work_tile.unmasked_end)) {
        const int first_row = load_shared(&work_tile.row_begin) + warp_row;
        const int first_key = block * Tiles::kBlockN + warp_n * Tiles::kWarpKeys;
        const int seqlen_q = load_shared(&work_tile.seqlen_q);
        const int seqlen_k = load_shared(&work_tile.seqlen_k);
        if (params.tree_mask == nullptr) {
          mask_scores(s, attention::make_mask(params, seqlen_q, seqlen_k), first_row,
                      load_shared(&work_tile.qhead_per_khead), first_key);
        } else {
          mask_tree_scores(
              s, attention::make_mask(params, seqlen_q, seqlen_k, load_shared(&work_tile.tree)),
              first_row, load_shared(&work_tile.qhead_per_khead), first_key);
        }
      }
      online_softmax_rescale(s, states, out, load_shared(&work_tile.scale.softmax_scale_log2));
      gemm_rs(out, s, pipeline.v[stage], warp_n * Tiles::kWarpKeys,
              primitives::optimisation_barrier(primitives::lane_idx()));
    }
    primitives::cp_async_wait<0>();
    primitives::sync_threads();  // all warps have read the pipeline: the results overwrite it

    // The tile coordinates are rematerialised, so that they take no registers in the loop.
    const WorkTileCoord result_coord =
        work_tile_coord(kernel_params, primitives::optimisation_barrier(primitives::block_idx().x),
                        primitives::optimisation_barrier(primitives::block_idx().y));
    const PackGqa result_rows = pack_gqa(params, result_coord.batch_idx, result_coord.kv_head);
    Results{{kernel_params, result_rows, result_coord.split,
             cache_scale(params.v_scale, params, result_coord.kv_head)},
            result_coord.row_begin,
            primitives::load_shared(&storage.work_tile.scale.softmax_scale_log2)}
        .write(storage.results, out, states, warp_row, warp_n);
  }
};

}  // namespace sink_attention::cuda::sm80
