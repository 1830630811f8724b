#include <stdexcept>
#include <string>

#include "cuda/family.h"

namespace sink_attention::cuda {

const char* family_name(Family family) {
  switch (family) {
    case Family::kSimt:
      return "simt";
    case Family::kSm80:
      return "sm80";
    case Family::kSm90:
      return "sm90";
  }
  return "unknown";
}

const char* why_not_sm90(const Device& device) {
  if (!kHasSm90) return "this library was built without them: TORCH_CUDA_ARCH_LIST had no 9.0";
  if (device.arch != 90) return "they run on compute capability 9.0 only";
  if (device.forced == Family::kSm80) return "sm80's are forced";
  return nullptr;
}

void must_not_be_forced(const Device& device, const char* op, const char* why_not) {
  if (device.forced != Family::kSm90) return;
  throw std::runtime_error(
      std::string("SINK_ATTENTION_CUDA_KERNELS or set_cuda_kernels forces the ") +
      "sm90 kernels, but they do not take this " + op + ": " + why_not);
}

}  // namespace sink_attention::cuda
