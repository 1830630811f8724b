#pragma once

#include <string>

#include "emulator/machine.h"

namespace sink_attention::primitives {

// "sink_attention::cuda::..." out of "std::string name_of() [with Kernel = ...; ...]".
template <class Kernel>
std::string name_of() {
  const std::string text = __PRETTY_FUNCTION__;
  const size_t begin = text.find("Kernel = ") + 9;
  return text.substr(begin, text.find_first_of(";]", begin) - begin);
}

template <class Kernel>
void launch(const typename Kernel::Params& params, Index3 grid, Stream) {
  using Config = typename Kernel::Config;
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  emulator::run_grid({grid.x, grid.y, grid.z}, Config::kThreads, Config::kSharedBytes,
                     [&params](char* shared) { Kernel::run(params, shared); });
  static const std::string name = name_of<Kernel>();
  ++emulator::settings().launches_of[name];
  emulator::settings().blocks_of[name] += static_cast<int64_t>(grid.x) * grid.y * grid.z;
}

}  // namespace sink_attention::primitives
