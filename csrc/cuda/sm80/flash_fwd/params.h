// What a forward kernel is given beside the problem itself.
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/device/score_scale.h"

namespace sink_attention::cuda::sm80 {

struct FlashFwdKernelParams {
  attention::FlashFwdParams attn;
  ScoreScale scale;
  // Whether each row can be copied 16 bytes at a time.
  bool q_is_vectorised;
  bool k_is_vectorised;
  bool v_is_vectorised;
  bool out_is_vectorised;
  BlockOrder order;  // of tiles of rows: a block's rank is how many tiles there are after its own
  int num_splits;    // parts of each row's keys; with more than one, results are partial
  // [num_splits][num_heads_q][total_q]: the state (maximum and sum, base 2) and the undivided
  // output of each row, without the sink. combine.cuh joins them.
  float* partial_state;  // two floats each
  float* partial_out;    // head_dim_v floats each
};

}  // namespace sink_attention::cuda::sm80
