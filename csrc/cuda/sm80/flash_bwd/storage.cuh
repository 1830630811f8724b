// The shared memory of a backward block.
#pragma once

#include <type_traits>

#include "cuda/sm80/flash_bwd/config.h"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm80 {

struct alignas(8) KeyRange {  // of a block's keys, those in a row's window
  int begin;
  int end;
};

template <class Element_, class Tiles>
struct FlashBwdStorage {
  using Element = Element_;
  using KTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDim>;
  using VTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDimV>;
  using ScoreTile = SmemTile<Element, Tiles::kBlockN, Tiles::kBlockM>;
  struct Nothing {};

  union {
    KTile k;
    VTile in_place_of_k;  // before K, V on its way to registers; after all tiles, dV
  };
  std::conditional_t<Tiles::kValuesInRegisters, Nothing, VTile> v;
  SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDim> q[Tiles::kStages];
  SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDimV> dout[Tiles::kStages];
  ScoreTile ds[Tiles::kStages];                                        // dS^T: a row for each key
  std::conditional_t<Tiles::kColumnWarps == 1, Nothing, ScoreTile> p;  // P^T
  alignas(16) float lse_log2[Tiles::kStages][Tiles::kBlockM];
  alignas(16) float delta[Tiles::kStages][Tiles::kBlockM];
  KeyRange window[Tiles::kStages][Tiles::kBlockM];
  // What all threads know of the block, kept here to leave them their registers.
  const Element* first_q;  // of position 0, first head of the group
  const Element* first_dout;
  bool q_is_vectorised;  // may be copied 16 bytes at a time
  bool dout_is_vectorised;
  int batch_idx;
  int kv_head;
  int first_key;
  int sink_end;  // of the block's keys, those before it are sink tokens
  int seqlen_q;
  int seqlen_k;
  int tiles_begin;  // tiles to visit
  int tiles_end;
  int first_workspace_tile;  // tile 0's place in the workspace
};

}  // namespace sink_attention::cuda::sm80
