// Shared memory of a backward CTA.
#pragma once

#include <type_traits>

#include "cuda/device/key_range.h"
#include "cuda/sm80/flash_bwd/config.h"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm80 {

template <class Element_, class Tiles>
struct FlashBwdStorage {
  using Element = Element_;
  using KTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDim>;
  using VTile = SmemTile<Element, Tiles::kBlockN, Tiles::kHeadDimV>;
  using ScoreTile = SmemTile<Element, Tiles::kBlockN, Tiles::kBlockM>;
  struct Nothing {};

  union {
    KTile k;
    VTile v_in_k_buffer;  // V before K is loaded, on its way to registers; dV after the last tile
  };
  std::conditional_t<Tiles::kValuesInRegisters, Nothing, VTile> v;
  SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDim> q[Tiles::kStages];
  SmemTile<Element, Tiles::kBlockM, Tiles::kHeadDimV> dout[Tiles::kStages];
  ScoreTile ds[Tiles::kStages];                                        // dS^T: one row per key
  std::conditional_t<Tiles::kColumnWarps == 1, Nothing, ScoreTile> p;  // P^T
  alignas(16) float lse_log2[Tiles::kStages][Tiles::kBlockM];
  alignas(16) float delta[Tiles::kStages][Tiles::kBlockM];
  KeyRange window[Tiles::kStages][Tiles::kBlockM];
  // Facts about the block that all threads need. They are kept here to save registers.
  const Element* first_q;  // address of PackGQA row 0 of the kv head
  const Element* first_dout;
  bool q_is_vectorised;  // rows can be copied in 16-byte vectors
  bool dout_is_vectorised;
  int batch_idx;
  int kv_head;
  int first_key;
  int sink_end;  // the block's keys [0, sink_end) are sink tokens; may be negative
  int seqlen_q;
  int seqlen_k;
  int tiles_begin;  // tiles [tiles_begin, tiles_end) are visited
  int tiles_end;
  int first_workspace_tile;  // index of tile 0 in the workspace
};

}  // namespace sink_attention::cuda::sm80
