#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

// A shuffle on the device: all lanes of a warp meet.
SA_DEVICE int warpgroup_idx(emulator::Site site = emulator::here()) {
  emulator::collective({"warpgroup_idx", site}, nullptr, nullptr);
  return thread_idx() / kWarpgroupSize;
}

template <int kCount>
SA_DEVICE void warpgroup_reg_dealloc(emulator::Site site = emulator::here()) {
  emulator::warpgroup_reg_dealloc(kCount, {"warpgroup_reg_dealloc", site});
}
template <int kCount>
SA_DEVICE void warpgroup_reg_alloc(emulator::Site site = emulator::here()) {
  emulator::warpgroup_reg_alloc(kCount, {"warpgroup_reg_alloc", site});
}

}  // namespace sink_attention::primitives
