// Starting a kernel.
//
//   struct Kernel {                            what every kernel of csrc/cuda is
//     struct Config { kThreads, kMinBlocks, kSharedBytes }    of constexpr int
//     using Params = ...;                     plain data, passed by value
//     static SA_DEVICE void run(const Params& problem, char* shared);
//   };
//   void launch<Kernel>(const typename Kernel::Params& problem, Index3 grid, Stream stream)
//        throws std::runtime_error if it cannot be started; an empty grid starts nothing
#pragma once

#include "primitives/simt.h"

namespace sink_attention::primitives {

using Stream = void*;  // a cudaStream_t; the emulator has none

}  // namespace sink_attention::primitives

#if defined(SA_EMULATE)
#include "primitives/host/launch.h"
#else
#include "primitives/ptx/launch.h"
#endif
