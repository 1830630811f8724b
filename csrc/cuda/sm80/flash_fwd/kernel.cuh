// The forward: one tile of rows of one kv head against the keys that they see.
//
// Block (x, y, z): tile of rows x, counted from the last, which under a causal mask has the most
// keys; kv head and split of its keys y; sequence z. Rows are (position, head of the group) pairs
// (packed_rows.cuh).
//
// The pipeline over blocks of keys j, with kStages = S buffers each of K and V (S = 1 shown):
//
//     thread block     wait K0  QK0      wait V0  soften 0, PV0   wait K1  QK1     wait V1  soften
//     1, PV1 copies        K0          V0 ......         K1 ............          V1 .... K2 ...
//
// Copies are committed in the order K0 V0 K1 V1 ..., and 2 (S - 1) groups stay under way at each
// wait.
#pragma once

#include "attention/mask.h"
#include "attention/paged_kv.h"
#include "cuda/sm80/flash_fwd/config.h"
#include "cuda/sm80/flash_fwd/load_keys.cuh"
#include "cuda/sm80/flash_fwd/problem.h"
#include "cuda/sm80/flash_fwd/results.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "cuda/tile/soften.cuh"
#include "primitives/cta.h"

namespace sink_attention::cuda::sm80 {

template <class Element_, class Tiles>
struct FlashFwdKernel {
  using Element = Element_;
  using Problem = FlashFwdKernelProblem;
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
  union SharedStorage {  // after the last block of keys, results take the pipeline's place
    Pipeline pipeline;
    typename Results::Storage results;
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
  static SA_DEVICE Place find_place(const Problem& kernel_problem, int x, int y) {
    const int tile = kernel_problem.num_tiles - 1 - x % kernel_problem.num_tiles;
    return {x / kernel_problem.num_tiles, y / kernel_problem.num_splits,
            y % kernel_problem.num_splits, tile * Tiles::kBlockM};
  }

  // The blocks of keys that it walks over; those in [full_begin, full_end) need no mask, since
  // every row sees all of their keys.
  struct KeyBlocks {
    int begin;
    int end;
    int full_begin;
    int full_end;
  };
  static SA_DEVICE KeyBlocks find_key_blocks(const attention::Mask& mask, attention::Range keys,
                                             int q_begin, int q_end, int split, int num_splits) {
    constexpr int kBlockN = Tiles::kBlockN;
    KeyBlocks blocks{};
    const int first = static_cast<int>(keys.begin) / kBlockN;
    const int last = (static_cast<int>(keys.end) + kBlockN - 1) / kBlockN;
    const int count = keys.begin < keys.end ? last - first : 0;
    blocks.begin = first + count * split / num_splits;
    blocks.end = first + count * (split + 1) / num_splits;
    blocks.full_begin =
        (static_cast<int>(mask.visible_keys(q_end - 1).begin) + kBlockN - 1) / kBlockN;
    blocks.full_end =
        static_cast<int>(attention::max_of(mask.visible_keys(q_begin).end, 0)) / kBlockN;
    return blocks;
  }

  static SA_DEVICE void run(const Problem& kernel_problem, char* shared) {
    const attention::FlashFwdProblem& problem = kernel_problem.problem;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    Pipeline& pipeline = storage.pipeline;
    const auto [batch_idx, kv_head, split, row_begin] =
        find_place(kernel_problem, primitives::block_idx().x, primitives::block_idx().y);
    const PackedRows rows = packed_rows(problem, batch_idx, kv_head);
    if (row_begin >= rows.num_rows) return;

    const int warp_m = primitives::warp_idx() % Tiles::kWarpsM;
    const int warp_n = primitives::warp_idx() / Tiles::kWarpsM;
    const int warp_row = warp_m * 16 * kTilesM;
    const int q_begin = rows.position(row_begin);
    const int last_row = attention::min_of(row_begin + Tiles::kBlockM, rows.num_rows) - 1;
    const int q_end = rows.position(last_row) + 1;
    const int seqlen_q = static_cast<int>(rows.info.seqlen_q);
    const int seqlen_k = static_cast<int>(rows.info.seqlen_k);
    const attention::Mask mask = attention::make_mask(problem, seqlen_q, seqlen_k);
    const attention::Range visible = mask.visible_keys(q_begin, q_end);
    const KeyBlocks blocks =
        find_key_blocks(mask, visible, q_begin, q_end, split, kernel_problem.num_splits);
    const auto keys = key_source<false>(problem, batch_idx, kv_head, rows.info, visible);
    const auto values = key_source<true>(problem, batch_idx, kv_head, rows.info, visible);

    const auto load_k = [&](int block) {
      if (block < blocks.end) {
        load_keys<kThreads>(pipeline.k[(block - blocks.begin) % Tiles::kStages], keys,
                            block * Tiles::kBlockN, kernel_problem.k_in_chunks);
      }
      primitives::cp_async_commit();
    };
    const auto load_v = [&](int block) {
      if (block < blocks.end) {
        load_keys<kThreads>(pipeline.v[(block - blocks.begin) % Tiles::kStages], values,
                            block * Tiles::kBlockN, kernel_problem.v_in_chunks);
      }
      primitives::cp_async_commit();
    };

    // Q belongs to the first group of copies.
    load_tile<kThreads>(pipeline.q, static_cast<int>(problem.head_dim), kernel_problem.q_in_chunks,
                        [&](int row) {
                          const int packed_row = row_begin + row;
                          return packed_row < rows.num_rows
                                     ? static_cast<const Element*>(problem.q) +
                                           rows.offset(packed_row, problem.q_stride_batch,
                                                       problem.q_stride_row, problem.q_stride_head)
                                     : nullptr;
                        });
    SA_UNROLL
    for (int stage = 0; stage < Tiles::kStages - 1; ++stage) {
      load_k(blocks.begin + stage);
      load_v(blocks.begin + stage);
    }
    load_k(blocks.begin + Tiles::kStages - 1);

    const ScoreScale scale = kernel_problem.scale.times(keys.scale(kv_head));
    RowStates<kTilesM> states;
    states.clear();
    Out out;
    out.clear();

    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int stage = (block - blocks.begin) % Tiles::kStages;
      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // K of this block is there; V of the last one is no longer read
      load_v(block + Tiles::kStages - 1);

      Scores s;
      s.clear();
      gemm_abt(s, pipeline.q, warp_row, pipeline.k[stage], warp_n * Tiles::kWarpKeys,
               primitives::opaque(primitives::lane_idx()));

      primitives::cp_async_wait<2 * (Tiles::kStages - 1)>();
      primitives::sync_threads();  // V of this block is there; its K is no longer read
      load_k(block + Tiles::kStages);

      transform_scores(s, scale);
      if (block < blocks.full_begin || block >= blocks.full_end) {
        mask_scores(s, attention::make_mask(problem, seqlen_q, seqlen_k),
                    primitives::opaque(row_begin + warp_row), rows.group,
                    block * Tiles::kBlockN + warp_n * Tiles::kWarpKeys);
      }
      soften(s, states, out, scale.to_log2);
      gemm_weights(out, s, pipeline.v[stage], warp_n * Tiles::kWarpKeys,
                   primitives::opaque(primitives::lane_idx()));
    }
    primitives::cp_async_wait<0>();
    primitives::sync_threads();  // nobody reads the pipeline any more: results take its place

    Results{kernel_problem, rows, row_begin, split, values.scale(kv_head), scale.to_log2}.write(
        storage.results, out, states, warp_row, warp_n);
  }
};

}  // namespace sink_attention::cuda::sm80
