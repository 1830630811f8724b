#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void sync_threads(emulator::Site site = emulator::here()) {
  emulator::barrier(0, emulator::current().block->num_threads(), {"sync_threads", site});
}

SA_DEVICE void sync_named(int id, int num_threads, emulator::Site site = emulator::here()) {
  if (id == 0) emulator::fault({"sync_named", site}, "barrier 0, which is sync_threads' own");
  emulator::barrier(id, num_threads, {"sync_named", site});
}

SA_DEVICE void arrive_named(int id, int num_threads, emulator::Site site = emulator::here()) {
  if (id == 0) emulator::fault({"arrive_named", site}, "barrier 0, which is sync_threads' own");
  emulator::arrive_at_barrier(id, num_threads, {"arrive_named", site});
}

}  // namespace sink_attention::primitives
