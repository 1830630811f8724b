// Arguments of the backward kernel, and its entries, one for each head-dim bucket
// (instantiations/sm80/flash_bwd_hdim*.cu).
#pragma once

#include "attention/params.h"
#include "cuda/device/block_order.h"
#include "cuda/kernels/bwd_workspace.h"

namespace sink_attention::cuda::sm80 {

struct FlashBwdKernelParams {
  attention::FlashBwdParams bwd;
  BwdWorkspace workspace;
  // Whether each row can be copied in 16-byte vectors.
  bool q_is_vectorised;
  bool k_is_vectorised;
  bool v_is_vectorised;
  bool dout_is_vectorised;
  bool dk_is_vectorised;
  bool dv_is_vectorised;
  BlockOrder order;     // of blocks of keys: tile index i is block i
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  // Without softcap: logit = score * softmax_scale_log2, in base 2.
  // With softcap:    logit = tanh(score * to_tanh) * softmax_scale_log2,
  //                  where softmax_scale_log2 = softcap * log2 e.
  float softmax_scale_log2;
  float to_tanh;
  bool has_softcap;
};

using Stream = void*;

void flash_bwd_hdim32(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim64(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim96(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim128(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim192(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim192_128(const FlashBwdKernelParams& params, Stream stream);
void flash_bwd_hdim256(const FlashBwdKernelParams& params, Stream stream);

}  // namespace sink_attention::cuda::sm80
