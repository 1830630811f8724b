// The decode kernels, one start for each head-dim bucket; hdim*.cu hold one each.
#pragma once

#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/params.h"

namespace sink_attention::cuda::sm90 {

using Stream = void*;

void decode_hdim32(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim64(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim96(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim128(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim192(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim192_128(const DecodeKernelParams& kernel_params, Stream stream);
void decode_hdim256(const DecodeKernelParams& kernel_params, Stream stream);

// Rows of the longest sequence and one kv head.
inline int64_t num_pack_gqa_rows(const attention::FlashFwdParams& params) {
  return params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
}

}  // namespace sink_attention::cuda::sm90
