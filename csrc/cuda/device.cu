// What the current device is, asked once for each.
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/backend.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {

Device current_device() {
  using primitives::check_cuda;
  constexpr int kMaxDevices = 64;
  static std::atomic<int64_t> known[kMaxDevices];  // arch << 32 | num_sms; 0: not asked yet
  int index = 0;
  check_cuda(cudaGetDevice(&index), "the current device");
  int64_t packed = index < kMaxDevices ? known[index].load() : 0;
  if (packed == 0) {
    int num_sms = 0;
    int major = 0;
    int minor = 0;
    check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index), "device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device");
    packed = static_cast<int64_t>(10 * major + minor) << 32 | num_sms;
    if (index < kMaxDevices) known[index].store(packed);
  }
  return {static_cast<int>(packed & 0xffffffff), static_cast<int>(packed >> 32)};
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  primitives::check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status),
                         "whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace sink_attention::cuda
