// Whose CUDA kernels run: what the environment or set_cuda_kernels forces, and which kernel a call
// would run.
#pragma once

#include <string>

#include "cuda/backend.h"
#include "torch/checks.h"

namespace sink_attention::binding {

// SINK_ATTENTION_CUDA_KERNELS or set_cuda_kernels, for all threads and devices: what a device's
// `forced` is; null: nothing is forced.
const char* forced_cuda_family();

// The architectures that the library counts as built for; the emulator's tests set others.
const char*& build_archs();

}  // namespace sink_attention::binding
