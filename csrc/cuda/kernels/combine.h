// The combine kernel of a split-KV forward (combine.cuh).
#pragma once

#include "attention/params.h"
#include "cuda/kernels/partials.h"

namespace sink_attention::cuda {

// Of more than one part. shape: of the same params.
void combine(const attention::FlashFwdParams& params, const CallShape& shape, int num_splits,
             const Partials& partials, void* stream);

}  // namespace sink_attention::cuda
