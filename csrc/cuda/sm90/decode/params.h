// What a decode kernel is given beside the problem itself.
#pragma once

#include "attention/params.h"
#include "cuda/device/score_scale.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct DecodeKernelParams {
  primitives::TensorMap k_map;  // of boxes of box_rows keys
  primitives::TensorMap v_map;
  attention::FlashFwdParams attn;
  ScoreScale scale;
  bool q_is_vectorised;  // whether each row can be copied 16 bytes at a time
  int box_rows;    // a power of 2 that divides a page and a block of keys; 0: there are no boxes
  int num_splits;  // parts of each row's keys; with more than one, results are partial
  // [num_splits][num_heads_q][total_q]: the state (maximum and sum, base 2) and the undivided
  // output of each row, without the sink. combine.cuh joins them.
  float* partial_state;  // two floats each
  float* partial_out;    // head_dim_v floats each
};

}  // namespace sink_attention::cuda::sm90
