// The decode kernels, one start for each head_dim class; hdim*.cu hold one each.
#pragma once

#include "cuda/sm90/paged_attn/config.h"
#include "cuda/sm90/paged_attn/problem.h"

namespace sink_attention::cuda::sm90 {

using Stream = void*;

void decode_hdim32(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim64(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim96(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim128(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim192(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim192_128(const DecodeKernelProblem& kernel_problem, Stream stream);
void decode_hdim256(const DecodeKernelProblem& kernel_problem, Stream stream);

// Rows of the longest sequence and one kv head.
inline int64_t packed_rows_of(const attention::FlashFwdProblem& problem) {
  return problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
}

}  // namespace sink_attention::cuda::sm90
