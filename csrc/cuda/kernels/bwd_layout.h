// The backward's workspace: memory of the caller, shared by the backward's kernels.
//
// It is divided into query tiles of tile_rows rows. The first used_rows of them hold PackGQA rows
// (device/pack_gqa.cuh) of one sequence and kv head. Every sequence starts at a tile:
//
//     dense      sequence b starts at tile  b * seqlen_q * qhead_per_khead / used_rows + b
//     packed     at the number of tiles of all sequences before it, which BwdFirstTiles computes
//
// One spare tile per sequence holds its last, partial tile, whatever the lengths in device memory
// are. The other spare tiles stay unused. A bad cu_seqlens_q with overlapping sequences may need
// more tiles than exist. Then the last sequences get none, and no two sequences share a tile.
//
// dq is summed in float32. Only these kernels read it, so it keeps the layout of the accumulators:
// 16 x 8 fragments (tile/fragment.cuh) of 128 floats, register by register, neighbouring lanes side
// by side. A warp then adds to 128 contiguous bytes with one instruction.
//
//     element (row, col) of a tile:   fragment  row / 16 * (dq_cols / 8) + col / 8
//                                     float     32 * reg + lane  of the fragment
#pragma once

#include <cstdint>

#include "cuda/call_shape.h"
#include "cuda/kernels/partials.h"

namespace sink_attention::cuda {

struct BwdWorkspace {
  int tile_rows;    // a multiple of 16
  int used_rows;    // at most tile_rows
  int dq_cols;      // head_dim, padded
  int num_tiles;    // of one kv head, including unused ones
  float* lse_log2;  // [num_heads_kv][num_tiles][tile_rows]: lse * log2 e; +inf where no key counts
  float* delta;     // [num_heads_kv][num_tiles][tile_rows]: <dout, out> - dlse
  float* dq;        // [num_heads_kv][num_tiles][tile_rows * dq_cols]: dq / softmax_scale
  float* sink_terms;  // [num_heads_q][num_tiles]: parts of ds_aux; null without a sink
  // [num_heads_kv][num_tiles]: how many blocks of keys have added to a tile's dq, in order. Null
  // unless deterministic.
  int* dq_semaphores;
  int* first_tiles;  // [batch]: first tile of packed sequences, at most num_tiles; null if dense
};

// Bump allocator over `memory`. With null memory it returns null and only counts bytes.
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

// Sets the workspace's sizes and pointers, from `memory` on. Returns the bytes needed. With null
// `memory` it only computes them.
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
  workspace.dq_semaphores = shape.deterministic ? allocator.take<int>(all_tiles) : nullptr;
  workspace.first_tiles = shape.is_packed_q ? allocator.take<int>(shape.batch) : nullptr;
  return allocator.used();
}

}  // namespace sink_attention::cuda
