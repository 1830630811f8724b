// The CUDA backend's forward on float8 q, k and v, which Hopper only has kernels for.
#pragma once

#include "attention/float8_problem.h"
#include "cuda/backend.h"

namespace sink_attention::cuda {

// Whether this device has kernels for the problem, whose results need not be set. Throws
// std::runtime_error if sm90's are forced and do not take it.
bool takes_flash_fwd_float8(const attention::FlashFwdFloat8Problem& problem, const Device& device);

// Of a problem that is taken; as flash_fwd does, without a workspace.
void flash_fwd_float8(const attention::FlashFwdFloat8Problem& problem, const Device& device,
                      Stream stream);

}  // namespace sink_attention::cuda
