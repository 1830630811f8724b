// The backward kernel's parameters.
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/kernels/bwd_workspace.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  BwdWorkspace workspace;
  // Maps of the head-dim bucket's TMA boxes (tensor_maps.h); set where has_..._map is true.
  primitives::TensorMap q_map;
  primitives::TensorMap dout_map;
  primitives::TensorMap k_map;
  primitives::TensorMap v_map;
  bool has_q_map;
  bool has_dout_map;
  bool has_k_map;
  bool has_v_map;
  BlockOrder order;     // of blocks of keys
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  // The logit in base 2 is score * softmax_scale_log2. With a softcap it is
  // tanh(score * to_tanh) * softmax_scale_log2, where softmax_scale_log2 is softcap * log2 e.
  float softmax_scale_log2;
  float to_tanh;
  bool has_softcap;
};

using Stream = void*;

void flash_bwd_hdim64(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim96(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim128(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim192(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim192_128(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim256(const FlashBwdKernelParams& params, Stream stream);

}  // namespace sink_attention::cuda::sm90
