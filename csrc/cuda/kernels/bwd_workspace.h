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

#include "attention/host_device.h"
#include "attention/params.h"
#include "primitives/memory.h"

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

SA_DEVICE int first_tile(const BwdWorkspace& workspace, const attention::FlashFwdParams& params,
                         int batch_idx) {
  if (workspace.first_tiles != nullptr) {
    return primitives::load_global(workspace.first_tiles + batch_idx);
  }
  const int64_t qhead_per_khead = params.num_heads_q / params.num_heads_kv;
  return static_cast<int>(batch_idx * params.seqlen_q * qhead_per_khead / workspace.used_rows) +
         batch_idx;
}

// The sequence whose tiles begin last at or before `tile`; -1 if there is none.
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

// Lays the parts out from `memory` on (null to measure) and returns how many bytes they take.
int64_t lay_out(const attention::FlashBwdParams& params, int tile_rows, int used_rows, int dq_cols,
                void* memory, BwdWorkspace& workspace);

// Before: first_tiles, lse_log2, delta, ds_aux; dq and the turns become 0. After: dq, scaled and
// rounded.
void bwd_preprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                    void* stream);
void bwd_postprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                     void* stream);

}  // namespace sink_attention::cuda
