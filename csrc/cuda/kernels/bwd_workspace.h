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

#include "attention/host_device.h"
#include "attention/params.h"
#include "primitives/memory.h"

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

SA_DEVICE int first_tile(const BwdWorkspace& workspace, const attention::FlashFwdParams& params,
                         int batch_idx) {
  if (workspace.first_tiles != nullptr) {
    return primitives::load_global(workspace.first_tiles + batch_idx);
  }
  const int64_t qhead_per_khead = params.num_heads_q / params.num_heads_kv;
  return static_cast<int>(batch_idx * params.seqlen_q * qhead_per_khead / workspace.used_rows) +
         batch_idx;
}

// The last sequence whose first tile is at or before `tile`; -1 if there is none.
SA_DEVICE int find_sequence(const BwdWorkspace& workspace, const attention::FlashFwdParams& params,
                            int tile) {
  int begin = 0;
  int end = static_cast<int>(params.batch);
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (first_tile(workspace, params, middle) <= tile) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin - 1;
}

// Sets the workspace's sizes and pointers, from `memory` on. Returns the bytes needed. With null
// `memory` it only computes them.
int64_t lay_out(const attention::FlashBwdParams& params, int tile_rows, int used_rows, int dq_cols,
                void* memory, BwdWorkspace& workspace);

// The preprocess kernels write first_tiles, lse_log2, delta and ds_aux, and clear dq and the
// dq semaphores. The postprocess kernel scales and rounds dq.
void bwd_preprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                    void* stream);
void bwd_postprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                     void* stream);

}  // namespace sink_attention::cuda
