#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void mbarrier_init(Mbarrier* barrier, int count, emulator::Site site = emulator::here()) {
  emulator::init_mbarrier(barrier, count, {"mbarrier_init", site});
}
SA_DEVICE void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
SA_DEVICE void mbarrier_arrive(Mbarrier* barrier, emulator::Site site = emulator::here()) {
  emulator::arrive_at_mbarrier(barrier, 0, {"mbarrier_arrive", site});
}
SA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes,
                                         emulator::Site site = emulator::here()) {
  emulator::arrive_at_mbarrier(barrier, bytes, {"mbarrier_arrive_expect_tx", site});
}
SA_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity,
                             emulator::Site site = emulator::here()) {
  emulator::wait_for_mbarrier(barrier, parity, {"mbarrier_wait", site});
}

}  // namespace sink_attention::primitives
