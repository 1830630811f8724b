// Attention in float32 and float64 without tensor cores: entry points of the kernels in this
// folder.
//
// Dense, varlen and paged, any head_dim and head_dim_v up to 256, any strides. num_splits is not
// looked at. Rows of q that belong to no sequence, and rows of k beyond seqused_k, are left alone.
//
// The backward is two calls: the first writes ds_aux, where there is a sink, and
//   delta[head * total_q + row] = <dout, out> - dlse
// of every row of q, total_q * num_heads_q numbers; rows are counted over the batch: row i of
// sequence b is b * seqlen_q + i, or cu_seqlens_q[b] + i. The second reads delta and writes dq, dk
// and dv. No number has two writers: gradients are bitwise repeatable.
#pragma once

#include "attention/params.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

// Throw std::runtime_error where one launch cannot take the forward.
void check_flash_fwd_float32(const attention::FlashFwdParams& params);
void check_flash_fwd_float64(const attention::FlashFwdParams& params);

void flash_fwd_float32(const attention::FlashFwdParams& params, Stream stream);
void flash_fwd_float64(const attention::FlashFwdParams& params, Stream stream);

void flash_bwd_rows_float32(const attention::FlashBwdParams& params, float* delta, Stream stream);
void flash_bwd_rows_float64(const attention::FlashBwdParams& params, double* delta, Stream stream);
void flash_bwd_float32(const attention::FlashBwdParams& params, const float* delta, Stream stream);
void flash_bwd_float64(const attention::FlashBwdParams& params, const double* delta, Stream stream);

}  // namespace sink_attention::cuda
