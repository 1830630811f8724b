// What a backward kernel is given beside the problem itself.
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/kernels/bwd_workspace.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  BwdWorkspace workspace;
  // Of the head-dim bucket's boxes (tensor_maps.h); where has_..._map is false there is none.
  primitives::TensorMap q_map;
  primitives::TensorMap dout_map;
  primitives::TensorMap k_map;
  primitives::TensorMap v_map;
  bool has_q_map;
  bool has_dout_map;
  bool has_k_map;
  bool has_v_map;
  BlockOrder order;     // of blocks of keys: a block's rank is its number
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  // A score becomes a logit in base 2 by softmax_scale_log2; with a softcap it is first tanh(score * to_tanh),
  // and softmax_scale_log2 is then of the cap.
  float softmax_scale_log2;
  float to_tanh;
  bool has_softcap;
};

}  // namespace sink_attention::cuda::sm90
