#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

SA_DEVICE void atomic_add(float* sum, float value, emulator::Site site = emulator::here()) {
  emulator::refuse_poison(value, "atomic_add", site);
  emulator::check_global(sum, sizeof(float), emulator::Access::kWrite, {"atomic_add", site});
  *sum += value;
}
SA_DEVICE void wait_for_turn(const int* turn, int mine, emulator::Site site = emulator::here()) {
  emulator::check_global(turn, sizeof(int), emulator::Access::kRead, {"wait_for_turn", site});
  emulator::wait_until_equal(turn, mine, {"wait_for_turn", site});
  emulator::note_turn();
}
SA_DEVICE void fence_turn_for_copies() { emulator::fence_turn(); }
SA_DEVICE void pass_turn(int* turn, int next, emulator::Site site = emulator::here()) {
  emulator::check_global(turn, sizeof(int), emulator::Access::kWrite, {"pass_turn", site});
  emulator::check_sums_are_made({"pass_turn", site});
  *turn = next;
}

}  // namespace sink_attention::primitives
