// Attention in float32 and float64 without tensor cores: entry points of the kernels in this
// folder.
//
// They take dense, varlen and paged calls, any head_dim and head_dim_v up to 256, and any strides.
// num_splits is ignored. Rows of q outside every sequence, and keys from seqused_k on, are
// untouched.
//
// The backward is two calls. The first writes ds_aux, if there is a sink, and delta:
//
//   delta[head * total_q + row] = <dout, out> - dlse        float[num_heads_q * total_q]
//   row  =  b * seqlen_q + i, or cu_seqlens_q[b] + i, for position i of sequence b
//
// The second reads delta and writes dq, dk and dv. No element has two writers, so gradients are
// bitwise repeatable.
#pragma once

#include "attention/params.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

// Throw std::runtime_error if one launch cannot take the forward.
void check_flash_fwd_float32(const attention::FlashFwdParams& params);
void check_flash_fwd_float64(const attention::FlashFwdParams& params);

void flash_fwd_float32(const attention::FlashFwdParams& params, Stream stream);
void flash_fwd_float64(const attention::FlashFwdParams& params, Stream stream);

void flash_bwd_rows_float32(const attention::FlashBwdParams& params, float* delta, Stream stream);
void flash_bwd_rows_float64(const attention::FlashBwdParams& params, double* delta, Stream stream);
void flash_bwd_float32(const attention::FlashBwdParams& params, const float* delta, Stream stream);
void flash_bwd_float64(const attention::FlashBwdParams& params, const double* delta, Stream stream);

}  // namespace sink_attention::cuda
