// The decode kernel's parameters.
#pragma once

#include "attention/params.h"
#include "cuda/device/score_scale.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct DecodeKernelParams {
  primitives::TensorMap k_map;  // TMA boxes of box_rows keys
  primitives::TensorMap v_map;
  attention::FlashFwdParams attn;
  ScoreScale scale;
  bool q_is_vectorised;  // each row is 16-byte aligned
  // Keys of a TMA box: a power of 2 that divides a page and a block of keys. 0: TMA is not used.
  int box_rows;
  int num_splits;  // parts of each row's keys; with more than one, results are partial
  // [num_splits, num_heads_q, total_q]: each row's softmax state (maximum and sum, base 2) and
  // unnormalised output, without the sink. kernels/combine.cuh merges them.
  float* partial_state;  // two floats each
  float* partial_out;    // head_dim_v floats each
};

}  // namespace sink_attention::cuda::sm90
