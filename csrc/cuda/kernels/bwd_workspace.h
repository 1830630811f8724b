// What the backward's kernels ask of their workspace (bwd_layout.h), and what runs before and after
// them.
#pragma once

#include "attention/params.h"
#include "cuda/kernels/bwd_layout.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

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

// The preprocess kernels write first_tiles, lse_log2, delta and ds_aux, and clear dq and the
// dq semaphores. The postprocess kernel scales and rounds dq.
void bwd_preprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                    void* stream);
void bwd_postprocess(const attention::FlashBwdParams& params, const BwdWorkspace& workspace,
                     void* stream);

}  // namespace sink_attention::cuda
