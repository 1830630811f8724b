// The forward kernels, one entry for each head-dim bucket; hdim*.cu hold one each.
#pragma once

#include "cuda/sm80/flash_fwd/params.h"

namespace sink_attention::cuda::sm80 {

using Stream = void*;

void flash_fwd_hdim32(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim64(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim96(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim128(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim192(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim192_128(const FlashFwdKernelParams& params, bool decode, Stream stream);
void flash_fwd_hdim256(const FlashFwdKernelParams& params, bool decode, Stream stream);

// How many rows (query positions times query heads of a kv head) a decode tile has.
constexpr int kDecodeRows = 16;

}  // namespace sink_attention::cuda::sm80
