#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void cp_async_16(void* shared, const void* global, bool valid,
                           emulator::Site site = emulator::here()) {
  emulator::start_copy(shared, global, 16, valid, {"cp_async_16", site});
}
SA_DEVICE void cp_async_4(void* shared, const void* global, bool valid,
                          emulator::Site site = emulator::here()) {
  emulator::start_copy(shared, global, 4, valid, {"cp_async_4", site});
}
SA_DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
SA_DEVICE void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

}  // namespace sink_attention::primitives
