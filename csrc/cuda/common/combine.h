// Joins partial results (combine.cuh).
#pragma once

#include "attention/problem.h"

namespace sink_attention::cuda {

void combine(const attention::FlashFwdProblem& problem, int num_splits, const float* partial_state,
             const float* partial_out, void* stream);

}  // namespace sink_attention::cuda
