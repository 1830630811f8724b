// A decode CTA's shared memory, and the range of key blocks that it loops over.
#pragma once

#include <type_traits>

#include "attention/block_list.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/stored_tile.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/row_results.cuh"
#include "cuda/tile/smem_tile.cuh"

namespace sink_attention::cuda::sm90 {

// QElement: the element type of the tensor cores' operands.
template <class QElement, class Tiles>
struct DecodeStorage {
  static constexpr bool kUpcasts = Tiles::kStoredBytes == 1;
  using QTile = SmemTile<QElement, Tiles::kBlockM, Tiles::kHeadDim>;
  using KTile = StoredTile<Tiles::kBlockN, Tiles::kHeadDim * Tiles::kStoredBytes>;
  using VTile = StoredTile<Tiles::kBlockN, Tiles::kHeadDimV * Tiles::kStoredBytes>;
  template <bool kValues>
  using Tile = std::conditional_t<kValues, VTile, KTile>;
  using ReductionBuffer = RowReductionBuffer<Tiles::kWarpsN, Tiles::kBlockM, Tiles::kHeadDimV>;

  struct alignas(1024) Stage {  // one block of keys, or of values
    char bytes[Tiles::kStageBytes];
  };
  union {  // the reduction buffer overlays the ring after the last block of keys
    Stage stages[Tiles::kStages];
    ReductionBuffer reduction_buffer;
  };
  QTile q;
  // The scales of a stage's keys or values, where each token has its own.
  float scales[kUpcasts ? Tiles::kStages : 1][kUpcasts ? Tiles::kBlockN : 4];
  float q_descales[kUpcasts ? Tiles::kBlockM : 4];  // undo the scaling of Q's rows (operands.cuh)
  Ring<Tiles::kStages> ring;

  template <bool kValues>
  SA_DEVICE Tile<kValues>& tile(int stage) {
    return *reinterpret_cast<Tile<kValues>*>(stages[stage].bytes);
  }
};

// The key blocks of a CTA's split: entries [begin, end) of the rows' block list.
struct KeyBlockRange {
  attention::BlockList<int> blocks;
  int begin;
  int end;
};

SA_DEVICE KeyBlockRange split_key_blocks(const attention::BlockList<int>& blocks, int split,
                                         int num_splits) {
  // At most 2^25 blocks, since a block has at least 64 keys.
  const auto count = static_cast<uint32_t>(blocks.count());
  const auto first = static_cast<uint32_t>(split);
  const auto parts = static_cast<uint32_t>(num_splits);
  return {blocks, static_cast<int>(count * first / parts),
          static_cast<int>(count * (first + 1) / parts)};
}

}  // namespace sink_attention::cuda::sm90
