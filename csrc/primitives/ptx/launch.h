#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sink_attention::primitives {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error was reported: let the next call start clean
  throw std::runtime_error(std::string("sink_attention_ext: ") + what + ": " +
                           cudaGetErrorString(status));
}

// The numbers are there to be read in the name (tools/cuda_resources.py, profilers): the compiler
// reports a kernel's registers, but not its block and not what is asked for at the launch.
template <class Kernel, int kThreads, int kSharedBytes>
__global__ void __launch_bounds__(kThreads, Kernel::Config::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) char shared[];
  Kernel::run(params, shared);
}

template <class Kernel>
void launch(const typename Kernel::Params& params, Index3 grid, Stream stream) {
  using Config = typename Kernel::Config;
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  const auto entry = kernel_entry<Kernel, Config::kThreads, Config::kSharedBytes>;
  if (Config::kSharedBytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Config::kSharedBytes),
               "shared memory of a kernel");
  }
  const dim3 blocks(grid.x, grid.y, grid.z);
  entry<<<blocks, Config::kThreads, Config::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      params);
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

}  // namespace sink_attention::primitives
