// The shared memory of a backward CTA.
#pragma once

#include "cuda/sm90/flash_bwd/config.h"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/smem_tile.cuh"
#include "primitives/mbarrier.h"

namespace sink_attention::cuda::sm90 {

struct alignas(8) KeyRange {  // the block's keys in a row's window: [begin, end)
  int begin;
  int end;
};

// The ring state of the i-th visited tile.
template <int kStages>
SA_DEVICE typename Ring<kStages>::PipelineState pipeline_state(int i) {
  return {i % kStages, i / kStages % 2};
}

// The CTA's block of keys. One thread writes it before the warps start.
struct FlashBwdBlockInfo {
  int batch_idx;
  int kv_head;
  int first_key;
  int sink_end;  // keys of the block before it are sink tokens
  int q_row;     // the sequence's first row in q
  int seqlen_q;
  int seqlen_k;
  int tiles_begin;  // tiles to visit
  int tiles_end;
  int first_workspace_tile;  // workspace index of tile 0
};

template <class Element_, class Tiles>
struct FlashBwdStorage {
  using Element = Element_;
  template <int kRows, int kCols>
  using Tile = SmemTile<Element, kRows, kCols, Tiles::slab_cols(kCols)>;
  // A row for each key.
  using ScoreTile = SmemTile<Element, Tiles::kBlockN, Tiles::kBlockM>;
  static constexpr int kStages = Tiles::kStages;
  static constexpr int kTilesDs = Tiles::kSharesKeys ? 1 : 2;
  static constexpr int kTilesP = Tiles::kSharesKeys ? 2 : 0;
  struct alignas(1024) AlignedScores {
    ScoreTile tile;
  };
  template <int kCols>
  struct alignas(1024) AlignedRows {
    Tile<Tiles::kBlockM, kCols> tile;
  };

  alignas(1024) Tile<Tiles::kBlockN, Tiles::kHeadDim> k;
  alignas(1024) Tile<Tiles::kBlockN, Tiles::kHeadDimV> v;
  AlignedRows<Tiles::kHeadDim> q[kStages];
  AlignedRows<Tiles::kHeadDimV> dout[kStages];
  // dS^T, then P^T. consumer.cuh says who may write which buffer when.
  AlignedScores scores[kTilesDs + kTilesP];
  alignas(1024) float dq[Tiles::kBlockM * Tiles::kHeadDim];  // in the order of the workspace
  alignas(128) float lse_log2[kStages][Tiles::kBlockM];      // with q
  alignas(128) float delta[kStages][Tiles::kBlockM];         // with dout
  alignas(16) KeyRange window[kStages][Tiles::kBlockM];      // with q, where is_masked
  int is_masked[kStages];
  Ring<kStages> q_ring;
  Ring<kStages> dout_ring;
  Ring<1> dq_ring;
  primitives::Mbarrier k_full;
  primitives::Mbarrier v_full;
  primitives::Mbarrier q_tail_full;  // TMA of a last tile with another sequence's rows (loader.cuh)
  primitives::Mbarrier dout_tail_full;
  FlashBwdBlockInfo info;
};

}  // namespace sink_attention::cuda::sm90
