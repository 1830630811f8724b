#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void atomic_add(float* sum, float value, emulator::Site site = emulator::here()) {
  emulator::refuse_poison(value, "atomic_add", site);
  emulator::check_global(sum, sizeof(float), emulator::Access::kWrite, {"atomic_add", site});
  *sum += value;
}
SA_DEVICE void semaphore_wait(const int* semaphore, int value,
                              emulator::Site site = emulator::here()) {
  emulator::check_global(semaphore, sizeof(int), emulator::Access::kRead, {"semaphore_wait", site});
  emulator::wait_until_equal(semaphore, value, {"semaphore_wait", site});
  emulator::mark_acquired();
}
SA_DEVICE void fence_proxy_async_global() { emulator::fence_semaphore(); }
SA_DEVICE void semaphore_release(int* semaphore, int value,
                                 emulator::Site site = emulator::here()) {
  emulator::check_global(semaphore, sizeof(int), emulator::Access::kWrite,
                         {"semaphore_release", site});
  emulator::check_bulk_sums_complete({"semaphore_release", site});
  *semaphore = value;
}

}  // namespace sink_attention::primitives
