#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void fence_proxy_async() { emulator::fence_async_proxy(); }

SA_DEVICE void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier,
                         emulator::Site site = emulator::here()) {
  emulator::start_bulk_load(shared, global, bytes, barrier, {"bulk_load", site});
}
SA_DEVICE void bulk_reduce_add(float* global, const float* shared, int bytes,
                               emulator::Site site = emulator::here()) {
  emulator::start_bulk_add(global, shared, bytes, {"bulk_reduce_add", site});
}
SA_DEVICE void bulk_commit() { emulator::commit_bulk(); }
template <int kPending>
SA_DEVICE void bulk_wait_read() {
  emulator::wait_for_bulk_reads(kPending);
}
template <int kPending>
SA_DEVICE void bulk_wait() {
  emulator::wait_for_bulk(kPending);
}

}  // namespace sink_attention::primitives
