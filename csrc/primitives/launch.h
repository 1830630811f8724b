// Starting a kernel.
//
//   struct Kernel {                            what every kernel of csrc/cuda is
//     struct Config { kThreads, kMinBlocks, kSharedBytes }    of constexpr int
//     using Params = ...;                     plain data, passed by value
//     static SA_DEVICE void run(const Params& problem, char* shared);
//   };
//   void launch<Kernel>(const typename Kernel::Params& problem, Index3 grid, Stream stream)
//        throws std::runtime_error, with the kernel's name, grid, block and shared memory, if it
//        cannot be started; an empty grid starts nothing
#pragma once

#include <string>

#include "primitives/simt.h"

namespace sink_attention::primitives {

using Stream = void*;  // a cudaStream_t; the emulator has none

// "sink_attention::cuda::..." out of "std::string name_of() [with Kernel = ...; ...]".
template <class Kernel>
std::string name_of() {
  const std::string text = __PRETTY_FUNCTION__;
  const size_t begin = text.find("Kernel = ") + 9;
  return text.substr(begin, text.find_first_of(";]", begin) - begin);
}

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/launch.h"
#else
#include "primitives/ptx/launch.h"
#endif
