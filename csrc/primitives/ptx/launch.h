#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sink_attention::primitives {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error was reported: let the next call start clean
  throw std::runtime_error(std::string("sink_attention_ext: ") + what + ": " +
                           cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// The numbers are there to be read in the name (tools/cuda_resources.py, profilers): the compiler
// reports a kernel's registers, but not its block and not what is asked for at the launch.
template <class Kernel, int kThreads, int kSharedBytes>
__global__ void __launch_bounds__(kThreads, Kernel::Config::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) char shared[];
  Kernel::run(params, shared);
}

// "the launch of sm80::FlashFwdKernel<...>, grid 8 x 1 x 1, block 128, ...". Made only to be thrown.
template <class Kernel>
std::string launch_text(Index3 grid) {
  using Config = typename Kernel::Config;
  return "the launch of " + name_of<Kernel>() + ", grid " + std::to_string(grid.x) + " x " +
         std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", block " +
         std::to_string(Config::kThreads) + ", " + std::to_string(Config::kSharedBytes) +
         " bytes of dynamic shared memory";
}

// An error that is there before the launch is another kernel's, or an earlier call's: it is not
// reported as this one's.
template <class Kernel>
void launch(const typename Kernel::Params& params, Index3 grid, Stream stream) {
  using Config = typename Kernel::Config;
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  cudaError_t status = cudaPeekAtLastError();
  if (status != cudaSuccess) {
    check_cuda(status,
               ("an earlier CUDA error, found before " + launch_text<Kernel>(grid)).c_str());
  }
  const auto entry = kernel_entry<Kernel, Config::kThreads, Config::kSharedBytes>;
  const void* const function = reinterpret_cast<const void*>(entry);
  if (Config::kSharedBytes > 48 * 1024) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Config::kSharedBytes);
  }
  if (status == cudaSuccess) {
    void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
    status = cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(Config::kThreads),
                              arguments, Config::kSharedBytes, static_cast<cudaStream_t>(stream));
  }
  if (status != cudaSuccess) check_cuda(status, launch_text<Kernel>(grid).c_str());
}

}  // namespace sink_attention::primitives
