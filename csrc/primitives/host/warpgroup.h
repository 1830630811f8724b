#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

// A shuffle on the device: all lanes of a warp meet.
SA_DEVICE int warpgroup_idx(emulator::Site site = emulator::here()) {
  emulator::collective({"warpgroup_idx", site}, nullptr, nullptr);
  return thread_idx() / kWarpgroupSize;
}

template <int kCount>
SA_DEVICE void give_registers(emulator::Site site = emulator::here()) {
  emulator::give_registers(kCount, {"give_registers", site});
}
template <int kCount>
SA_DEVICE void take_registers(emulator::Site site = emulator::here()) {
  emulator::take_registers(kCount, {"take_registers", site});
}

}  // namespace sink_attention::primitives
