#pragma once

#include "emulator/machine.h"

#define SA_DEVICE inline
#define SA_UNROLL
#define SA_ROLLED

namespace sink_attention::primitives {

SA_DEVICE int thread_idx() { return emulator::current().thread_idx; }
SA_DEVICE int lane_idx() { return emulator::current().thread_idx % kWarpSize; }
SA_DEVICE int rematerialise_thread_idx() { return thread_idx(); }
SA_DEVICE int rematerialise_lane_idx() { return lane_idx(); }
// A shuffle on the device: all lanes meet.
SA_DEVICE int warp_idx(emulator::Site site = emulator::here()) {
  emulator::collective({"warp_idx", site}, nullptr, nullptr);
  return thread_idx() / kWarpSize;
}
SA_DEVICE Index3 block_idx() {
  const emulator::Grid at = emulator::current().block->index;
  return {at.x, at.y, at.z};
}
SA_DEVICE Index3 grid_dim() {
  const emulator::Grid grid = emulator::current().block->machine->grid();
  return {grid.x, grid.y, grid.z};
}

SA_DEVICE int optimisation_barrier(int x) { return x; }

}  // namespace sink_attention::primitives
