// The forward: one tile of rows of one kv head against the keys that they see.
//
// Thread block (x, y): x counts tiles in the order of common/block_order.h, the last ones, which
// under a causal mask have the most keys, first; y is the split of their keys. Rows are (position,
// head of the group) pairs (pack_gqa.cuh).
//
// The pipeline, with S = kStages buffers each of K and V, for each block of keys j:
//
//     wait for K j,  barrier        start to copy V j + S - 1      S = Q K^T
//     wait for V j,  barrier        start to copy K j + S          soften,  O += P V
//
// A copy overwrites what all warps have left behind at the barrier before it. Groups of copies are
// committed in the order K 0, V 0, K 1, V 1, ..., so 2 (S - 1) of them stay under way at each wait:
// at head_dim 64 in decode (S = 4, 64 keys) 56 KB a thread block.
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
  // What all threads need once in a block of keys. In shared memory, since the accumulators of
  // head_dim 128 leave no registers for it.
  struct Work {
    const char* k_base;
    const char* v_base;
    const int32_t* pages;
    const int64_t* tree;  // this sequence's part of the tree mask, or null
    int sink_end;         // keys that may be read: [0, sink_end) and [key_begin, key_end)
    const float* k_scales;
    const float* v_scales;
    int key_begin;
    int key_end;
    attention::BlockList<int> blocks;
    int seqlen_q;
    int seqlen_k;
    int row_begin;
    int qhead_per_khead;
    int full_begin;  // blocks of keys in [full_begin, full_end) need no mask
    int full_end;
    ScoreScale scale;
  };
  struct SharedStorage {
    union {  // after the last block of keys, results take the pipeline's place
      Pipeline pipeline;
      typename Results::Storage results;
    };
    Work work;
  };
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(SharedStorage));
  };
  static_assert(Config::kSharedBytes <= 99 * 1024, "what compute capability 8.6 has for a block");

  // What a thread block works on.
  struct Place {
    int batch_idx;
    int kv_head;
    int split;
    int row_begin;
  };
  static SA_DEVICE Place find_place(const Params& kernel_params, int x, int y) {
    const BlockPlace place = place_of_block(kernel_params.order, x);
    const int tile = kernel_params.order.blocks_per_pair - 1 - place.rank;
    return {place.batch_idx, place.kv_head, y, tile * Tiles::kBlockM};
  }

  // Which blocks of its tile's list it walks over: numbers begin to end - 1.
  struct Walk {
    int begin;
    int end;
  };
  static SA_DEVICE Walk find_walk(const attention::BlockList<int>& blocks, int split,
                                  int num_splits) {
    const int count = blocks.count();
    return {count * split / num_splits, count * (split + 1) / num_splits};
  }

  static SA_DEVICE void store_work(Work& stored, const Work& work) {
    using primitives::store_shared;
    store_shared(&stored.k_base, work.k_base);
    store_shared(&stored.v_base, work.v_base);
    store_shared(&stored.pages, work.pages);
    store_shared(&stored.tree, work.tree);
    store_shared(&stored.sink_end, work.sink_end);
    store_shared(&stored.k_scales, work.k_scales);
    store_shared(&stored.v_scales, work.v_scales);
    store_shared(&stored.key_begin, work.key_begin);
    store_shared(&stored.key_end, work.key_end);
    store_shared(&stored.blocks.sink_end, work.blocks.sink_end);
    store_shared(&stored.blocks.begin, work.blocks.begin);
    store_shared(&stored.blocks.end, work.blocks.end);
    store_shared(&stored.seqlen_q, work.seqlen_q);
    store_shared(&stored.seqlen_k, work.seqlen_k);
    store_shared(&stored.row_begin, work.row_begin);
    store_shared(&stored.qhead_per_khead, work.qhead_per_khead);
    store_shared(&stored.full_begin, work.full_begin);
    store_shared(&stored.full_end, work.full_end);
    store_shared(&stored.scale.softmax_scale_log2, work.scale.softmax_scale_log2);
    store_shared(&stored.scale.to_tanh, work.scale.to_tanh);
    store_shared(&stored.scale.form, work.scale.form);
  }
  template <bool kValues>
  static SA_DEVICE KeySource<kValues> stored_source(const attention::FlashFwdParams& params,
                                                    const Work& work) {
    using primitives::load_shared;
    return {params,
            load_shared(kValues ? &work.v_base : &work.k_base),
            load_shared(&work.pages),
            load_shared(kValues ? &work.v_scales : &work.k_scales),
            load_shared(&work.sink_end),
            load_shared(&work.key_begin),
            load_shared(&work.key_end)};
  }
  static SA_DEVICE attention::BlockList<int> stored_blocks(const Work& work) {
    using primitives::load_shared;
    return {load_shared(&work.blocks.sink_end), load_shared(&work.blocks.begin),
            load_shared(&work.blocks.end)};
  }

  // Starts the copy of block number idx of keys or values, if there is one, and closes its group.
  template <bool kValues, class Tile>
  static SA_DEVICE void load_block(Tile* stages, const KeySource<kValues>& source,
                                   const attention::BlockList<int>& blocks, int idx,
                                   const Walk& walk, bool is_vectorised) {
    if (idx < walk.end) {
      load_keys<kThreads>(stages[(idx - walk.begin) % Tiles::kStages], source,
                          blocks.block(idx) * Tiles::kBlockN, is_vectorised);
    }
    primitives::cp_async_commit();
  }

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashFwdParams& params = kernel_params.attn;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    Pipeline& pipeline = storage.pipeline;
    const Place place =
        find_place(kernel_params, primitives::block_idx().x, primitives::block_idx().y);
    const int batch_idx = place.batch_idx;
    const int kv_head = place.kv_head;
    const int row_begin = place.row_begin;
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
    const Walk walk = find_walk(blocks, place.split, kernel_params.num_splits);
    const auto keys = key_source<false>(params, batch_idx, kv_head, rows.info, visible);
    const auto values = key_source<true>(params, batch_idx, kv_head, rows.info, visible);

    if (primitives::thread_idx() == 0) {
      constexpr int kBlockN = Tiles::kBlockN;
      Work work{};
      work.k_base = keys.base;
      work.v_base = values.base;
      work.pages = keys.pages;
      work.tree = mask.tree;
      work.sink_end = keys.sink_end;
      work.k_scales = keys.scales;
      work.v_scales = values.scales;
      work.key_begin = keys.begin;
      work.key_end = keys.end;
      work.blocks = blocks;
      work.seqlen_q = static_cast<int>(rows.info.seqlen_q);
      work.seqlen_k = static_cast<int>(rows.info.seqlen_k);
      work.row_begin = row_begin;
      work.qhead_per_khead = rows.qhead_per_khead;
      const attention::Range full = mask.keys_seen_by_all(q_begin, q_end);
      work.full_begin = (static_cast<int>(full.begin) + kBlockN - 1) / kBlockN;
      work.full_end = static_cast<int>(attention::max_of(full.end, 0)) / kBlockN;
      work.scale = kernel_params.scale.times(cache_scale(params.k_scale, params, kv_head));
      store_work(storage.work, work);
    }

    // Q belongs to the first group of copies.
    load_tile<kThreads>(pipeline.q, static_cast<int>(params.head_dim),
                        kernel_params.q_is_vectorised, [&](int row) {
                          const int packed_row = row_begin + row;
                          return packed_row < rows.num_rows
                                     ? static_cast<const Element*>(params.q) +
                                           rows.offset(packed_row, params.q_stride_batch,
                                                       params.q_stride_row, params.q_stride_head)
                                     : nullptr;
                        });
    SA_UNROLL
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      load_block(pipeline.k, keys, blocks, walk.begin + stage, walk, kernel_params.k_is_vectorised);
      if (stage == Tiles::kStages - 1) break;
      load_block(pipeline.v, values, blocks, walk.begin + stage, walk,
                 kernel_params.v_is_vectorised);
    }

    RowStates<kTilesM> states;
    states.clear();
    Out out;
    out.clear();

    for (int idx = walk.begin; idx < walk.end; ++idx) {
      const int stage = (idx - walk.begin) % Tiles::kStages;
      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // K of this block is there; V of the last one is no longer read
      load_block(pipeline.v, stored_source<true>(params, storage.work), stored_blocks(storage.work),
                 idx + Tiles::kStages - 1, walk, kernel_params.v_is_vectorised);

      Scores s;
      s.clear();
      gemm_abt(s, pipeline.q, warp_row, pipeline.k[stage], warp_n * Tiles::kWarpKeys,
               primitives::optimisation_barrier(primitives::lane_idx()));

      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // V of this block is there; its K is no longer read
      load_block(pipeline.k, stored_source<false>(params, storage.work),
                 stored_blocks(storage.work), idx + Tiles::kStages, walk,
                 kernel_params.k_is_vectorised);

      const Work& work = storage.work;
      using primitives::load_shared;
      transform_scores(s, load_shared(&work.scale.form), load_shared(&work.scale.to_tanh));
      const int block = stored_blocks(work).block(idx);
      if (block < load_shared(&work.full_begin) || block >= load_shared(&work.full_end)) {
        const int first_row = load_shared(&work.row_begin) + warp_row;
        const int first_key = block * Tiles::kBlockN + warp_n * Tiles::kWarpKeys;
        const int seqlen_q = load_shared(&work.seqlen_q);
        const int seqlen_k = load_shared(&work.seqlen_k);
        if (params.tree_mask == nullptr) {
          mask_scores(s, attention::make_mask(params, seqlen_q, seqlen_k), first_row,
                      load_shared(&work.qhead_per_khead), first_key);
        } else {
          mask_tree_scores(
              s, attention::make_mask(params, seqlen_q, seqlen_k, load_shared(&work.tree)),
              first_row, load_shared(&work.qhead_per_khead), first_key);
        }
      }
      online_softmax_rescale(s, states, out, load_shared(&work.scale.softmax_scale_log2));
      gemm_weights(out, s, pipeline.v[stage], warp_n * Tiles::kWarpKeys,
                   primitives::optimisation_barrier(primitives::lane_idx()));
    }
    primitives::cp_async_wait<0>();
    primitives::sync_threads();  // nobody reads the pipeline any more: results take its place

    // The place anew: what only the ends of a kernel need shall take no registers in its loop.
    const Place again =
        find_place(kernel_params, primitives::optimisation_barrier(primitives::block_idx().x),
                   primitives::optimisation_barrier(primitives::block_idx().y));
    const PackGqa result_rows = pack_gqa(params, again.batch_idx, again.kv_head);
    Results{{kernel_params, result_rows, again.split,
             cache_scale(params.v_scale, params, again.kv_head)},
            again.row_begin,
            primitives::load_shared(&storage.work.scale.softmax_scale_log2)}
        .write(storage.results, out, states, warp_row, warp_n);
  }
};

}  // namespace sink_attention::cuda::sm80
