// Arguments of the forward kernel.
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/device/score_scale.h"

namespace sink_attention::cuda::sm80 {

struct FlashFwdKernelParams {
  attention::FlashFwdParams attn;
  ScoreScale scale;
  // Whether each row can be copied in 16-byte vectors.
  bool q_is_vectorised;
  bool k_is_vectorised;
  bool v_is_vectorised;
  bool out_is_vectorised;
  BlockOrder order;  // of row tiles: tile index i is the i-th from the last
  int num_splits;    // parts of each row's keys; with more than one, results are partial
  // Partial results, [num_splits][num_heads_q][total_q], without the sink. combine.cuh merges them.
  float* partial_state;  // maximum and sum of a row, base 2: two floats
  float* partial_out;    // output not yet divided by the sum: head_dim_v floats
};

}  // namespace sink_attention::cuda::sm80
