// Starts the float8 forward kernel of one head_dim class.
#pragma once

#include "cuda/sm90/flash_fwd/launch.cuh"
#include "cuda/sm90/flash_fwd_fp8/config.h"
#include "cuda/sm90/flash_fwd_fp8/entry.h"
#include "cuda/sm90/flash_fwd_fp8/transposer.cuh"

namespace sink_attention::cuda::sm90 {

// The problem as copies see it, whose rows of q, k and v are pairs of numbers: 16 bits each, half
// as many.
inline attention::FlashFwdProblem in_pairs(attention::FlashFwdProblem problem) {
  problem.dtype = problem.kv_dtype = attention::DataType::kBFloat16;  // any of 16 bits
  for (int64_t* count : {&problem.head_dim, &problem.head_dim_v, &problem.q_stride_batch,
                         &problem.q_stride_row, &problem.q_stride_head, &problem.k_stride_batch,
                         &problem.k_stride_row, &problem.k_stride_head, &problem.v_stride_batch,
                         &problem.v_stride_row, &problem.v_stride_head}) {
    *count /= 2;
  }
  return problem;
}

template <int kHeadDim>
void launch_flash_fwd_float8(const attention::FlashFwdFloat8Problem& problem, int num_sms,
                             Stream stream) {
  FlashFwdKernelProblem kernel_problem{};
  kernel_problem.problem = in_pairs(problem.fwd);
  kernel_problem.out_cols = static_cast<int>(problem.fwd.head_dim_v);
  kernel_problem.q_descale = problem.q_descale;
  kernel_problem.k_descale = problem.k_descale;
  kernel_problem.v_descale = problem.v_descale;
  launch_tiles<attention::Float8E4M3, FlashFwdFloat8TilesOf<kHeadDim>>(kernel_problem, num_sms,
                                                                       stream);
}

}  // namespace sink_attention::cuda::sm90
