// A decode block's shared memory, and which keys it walks over.
#pragma once

#include <type_traits>

#include "attention/block_list.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/stored_tile.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/row_results.cuh"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm90 {

// QElement: of the tensor cores' operands.
template <class QElement, class Tiles>
struct DecodeStorage {
  static constexpr bool kUpcasts = Tiles::kStoredBytes == 1;
  using QTile = SmemTile<QElement, Tiles::kBlockM, Tiles::kHeadDim>;
  using KTile = StoredTile<Tiles::kBlockN, Tiles::kHeadDim * Tiles::kStoredBytes>;
  using VTile = StoredTile<Tiles::kBlockN, Tiles::kHeadDimV * Tiles::kStoredBytes>;
  template <bool kValues>
  using Tile = std::conditional_t<kValues, VTile, KTile>;
  using ReductionBuffer = RowExchange<Tiles::kWarpsN, Tiles::kBlockM, Tiles::kHeadDimV>;

  struct alignas(1024) Stage {  // a block of keys or of values
    char bytes[Tiles::kStageBytes];
  };
  union {  // after the last block of keys, results take the ring's place
    Stage stages[Tiles::kStages];
    ReductionBuffer reduction_buffer;
  };
  QTile q;
  // Of a stage's keys or values, where each token has a scale of its own.
  float scales[kUpcasts ? Tiles::kStages : 1][kUpcasts ? Tiles::kBlockN : 4];
  float q_factors[kUpcasts ? Tiles::kBlockM : 4];  // what rows of q are yet to be multiplied with
  Ring<Tiles::kStages> ring;

  template <bool kValues>
  SA_DEVICE Tile<kValues>& tile(int stage) {
    return *reinterpret_cast<Tile<kValues>*>(stages[stage].bytes);
  }
};

// Which blocks of its rows' list a thread block walks over: numbers begin to end - 1.
struct DecodeWalk {
  attention::BlockList<int> blocks;
  int begin;
  int end;
};

SA_DEVICE DecodeWalk decode_walk(const attention::BlockList<int>& blocks, int split,
                                 int num_splits) {
  const auto count = static_cast<uint32_t>(blocks.count());  // 2^25 at most: 64 keys and more each
  const auto first = static_cast<uint32_t>(split);
  const auto parts = static_cast<uint32_t>(num_splits);
  return {blocks, static_cast<int>(count * first / parts),
          static_cast<int>(count * (first + 1) / parts)};
}

}  // namespace sink_attention::cuda::sm90
