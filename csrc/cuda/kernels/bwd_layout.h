// What the backward's kernels hand to each other, in memory that the caller lends.
//
// All of it is cut into query tiles of tile_rows rows, into which used_rows packed rows
// (tile/pack_gqa.cuh) of one sequence and kv head are put. Sequences follow each other, each
// from a whole tile on:
//
//     dense      sequence b starts at tile  b * seqlen_q * group / used_rows + b
//     packed     at the sum of the tiles of those before it, which a kernel computes first
//
// One spare tile a sequence makes room for its last, partial one, whatever the lengths in device
// memory are; tiles that no row falls into stay unused. Packed sequences that cu_seqlens_q lets
// overlap may want more tiles than there are: the last ones then go without, and no two share one.
//
// dq is summed in float32, and only these kernels read it, so it lies as the products leave it:
// 16 x 8 fragments (tile/fragment.cuh), each lane's number beside its neighbour's. A warp then adds
// to 128 bytes in a row with one instruction.
//
//     number (row, col) of a tile: fragment row / 16 * (dq_cols / 8) + col / 8, of 128 floats, in
//     it  32 * reg + lane
#pragma once

#include <cstdint>

#include "cuda/call_shape.h"
#include "cuda/kernels/partials.h"

namespace sink_attention::cuda {

struct BwdWorkspace {
  int tile_rows;    // a multiple of 16
  int used_rows;    // at most tile_rows
  int dq_cols;      // head_dim, padded
  int num_tiles;    // of one kv head, the unused ones too
  float* lse_log2;  // [num_heads_kv][num_tiles][tile_rows]: lse * log2 e; +inf where no key counts
  float* delta;     // [num_heads_kv][num_tiles][tile_rows]: <dout, out> - dlse
  float* dq;        // [num_heads_kv][num_tiles][tile_rows * dq_cols]: dq / softmax_scale
  float* sink_terms;  // [num_heads_q][num_tiles]: parts of ds_aux; null without a sink
  int* turns;  // [num_heads_kv][num_tiles]: blocks of keys that have added to dq; null unless they
               // must do so in order
  int* first_tiles;  // [batch]: where packed sequences start, at most num_tiles; else null
};

// Gives out parts of a piece of memory, or only counts where there is none.
class BumpAllocator {
 public:
  explicit BumpAllocator(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Lays the parts out from `memory` on (null to measure) and returns how many bytes they take.
inline int64_t lay_out(const CallShape& shape, int tile_rows, int used_rows, int dq_cols,
                       void* memory, BwdWorkspace& workspace) {
  const int64_t num_tiles = shape.total_q * shape.qhead_per_khead() / used_rows + shape.batch;
  const int64_t all_tiles = num_tiles * shape.num_heads_kv;
  BumpAllocator allocator(memory);
  workspace.tile_rows = tile_rows;
  workspace.used_rows = used_rows;
  workspace.dq_cols = dq_cols;
  workspace.num_tiles = static_cast<int>(num_tiles);
  workspace.lse_log2 = allocator.take<float>(all_tiles * tile_rows);
  workspace.delta = allocator.take<float>(all_tiles * tile_rows);
  workspace.dq = allocator.take<float>(all_tiles * tile_rows * dq_cols);
  workspace.sink_terms =
      shape.has_sink ? allocator.take<float>(num_tiles * shape.num_heads_q) : nullptr;
  workspace.turns = shape.deterministic ? allocator.take<int>(all_tiles) : nullptr;
  workspace.first_tiles = shape.is_packed_q ? allocator.take<int>(shape.batch) : nullptr;
  return allocator.used();
}

}  // namespace sink_attention::cuda
