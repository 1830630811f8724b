// Attention in float32 and float64 without tensor cores: entry points of the kernels in this folder.
//
// Dense, varlen and paged, any head_dim and head_dim_v up to 256, any strides. num_splits is not
// looked at. Rows of q that belong to no sequence, and rows of k beyond seqused_k, are left alone.
//
// The backward is given
//   delta[head * total_q + row] = <dout, out> - dlse
// of every row of q; rows are counted over the batch: row i of sequence b is b * seqlen_q + i, or
// cu_seqlens_q[b] + i. It writes dq, dk and dv, without atomics: results are bitwise repeatable.
#pragma once

#include "attention/problem.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

void flash_fwd_float32(const attention::FlashFwdProblem& problem, Stream stream);
void flash_fwd_float64(const attention::FlashFwdProblem& problem, Stream stream);

void flash_bwd_float32(const attention::FlashBwdProblem& problem, const float* delta,
                       Stream stream);
void flash_bwd_float64(const attention::FlashBwdProblem& problem, const double* delta,
                       Stream stream);

}  // namespace sink_attention::cuda
