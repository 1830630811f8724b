// Whose kernels run a problem: the part of the choice that forward and backward share.
#pragma once

#include "cuda/backend.h"

namespace sink_attention::cuda {

#if defined(SINK_WITHOUT_SM90)
constexpr bool kHasSm90 = false;
#else
constexpr bool kHasSm90 = true;
#endif

// Why nothing goes to sm90's kernels on this device; null if what they take does.
const char* why_not_sm90(const Device& device);

// Throws std::runtime_error if sm90's kernels are forced: `op` is what they do not take, and why.
void must_not_be_forced(const Device& device, const char* op, const char* why_not);

}  // namespace sink_attention::cuda
