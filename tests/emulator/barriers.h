// A block's barriers: that of all threads, and the named ones (bar.sync, bar.arrive).
//
// Both instructions are a warp's (.aligned): its 32 lanes meet, and the warp comes to the barrier.
#pragma once

#include <cstdint>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

struct Barrier {
  uint32_t came = 0;   // warps, a bit each
  uint32_t waits = 0;  // those of them that wait
  int num_threads = 0;
  // Of the warp that came first, its last lane.
  int first_thread = -1;
  Step first{};
};

struct Barriers {
  static constexpr int kCount = 16;
  Barrier of[kCount];
  Arrivals went_on[kCount];  // of each barrier, those that did not wait

  void start();            // a new block
  void check_end() const;  // by its last thread: a barrier that not all came to is a fault
};

// Barrier `id` of the block, for num_threads threads in whole warps. The lanes of a warp come from
// the same place; at barrier 0 all warps do.
void barrier(int id, int num_threads, const Step& step);
// The same arrival without the wait.
void arrive_at_barrier(int id, int num_threads, const Step& step);

}  // namespace emulator
