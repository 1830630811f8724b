// Attention in float32 and float64 without tensor cores: the launches. The rows are in
// simt/table.cpp.
//
// Dense, varlen and paged, any strides. num_splits is not looked at. Rows of q that belong to no
// sequence, and rows of k beyond seqused_k, are left alone.
//
// The backward first writes ds_aux, where there is a sink, and into the workspace
//   delta[head * total_q + row] = <dout, out> - dlse
// of every row of q; rows are counted over the batch: row i of sequence b is b * seqlen_q + i, or
// cu_seqlens_q[b] + i. Then it reads delta and writes dq, dk and dv. No element has two writers:
// gradients are bitwise repeatable.
#pragma once

#include <stdexcept>

#include "cuda/registry.h"
#include "cuda/simt/flash_bwd/config.h"
#include "cuda/simt/flash_fwd/config.h"

namespace sink_attention::cuda::simt {

// Tiles: FlashFwdTiles or FlashBwdTiles of float or double.
template <class Tiles>
SA_LAUNCH launch_flash_fwd(const FlashFwdCall& call);
template <class Tiles>
SA_LAUNCH launch_flash_bwd(const FlashBwdCall& call);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block for each tile of each kv head of each sequence; tiles are counted of the longest one.
inline int blocks_of(const CallShape& shape, int64_t num_tiles) {
  const int64_t blocks = num_tiles * shape.num_heads_kv * shape.batch;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(
        "float32 or float64 attention: more rows or keys than one launch can take");
  }
  return static_cast<int>(blocks);
}

}  // namespace sink_attention::cuda::simt
