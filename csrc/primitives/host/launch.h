#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

template <class Kernel>
void launch(const typename Kernel::Problem& problem, Index3 grid, Stream) {
  using Config = typename Kernel::Config;
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  emulator::run_grid({grid.x, grid.y, grid.z}, Config::kThreads, Config::kSharedBytes,
                     [&problem](char* shared) { Kernel::run(problem, shared); });
}

}  // namespace sink_attention::primitives
