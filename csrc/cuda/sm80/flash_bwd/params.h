// What a backward kernel is given beside the problem itself.
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/kernels/bwd_workspace.h"

namespace sink_attention::cuda::sm80 {

struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  BwdWorkspace workspace;
  // Whether each row can be copied 16 bytes at a time.
  bool q_is_vectorised;
  bool k_is_vectorised;
  bool v_is_vectorised;
  bool dout_is_vectorised;
  bool dk_is_vectorised;
  bool dv_is_vectorised;
  BlockOrder order;     // of blocks of keys: a block's rank is its number
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  // A score becomes a logit in base 2 by softmax_scale_log2; with a softcap it is first tanh(score * to_tanh),
  // and softmax_scale_log2 is then of the cap.
  float softmax_scale_log2;
  float to_tanh;
  bool has_softcap;
};

}  // namespace sink_attention::cuda::sm80
