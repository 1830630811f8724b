// A block's barriers: barrier 0 (sync_threads) and the named ones (bar.sync, bar.arrive).
//
// Both instructions are warp-wide (.aligned): the 32 lanes meet, and then the warp arrives.
#pragma once

#include <cstdint>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

struct Barrier {
  uint32_t came = 0;   // the warps that arrived, as bits
  uint32_t waits = 0;  // the warps that wait, as bits
  int num_threads = 0;
  // The last lane of the first warp to arrive.
  int first_thread = -1;
  Step first{};
};

struct Barriers {
  static constexpr int kCount = 16;
  Barrier of[kCount];
  Arrivals went_on[kCount];  // of each barrier: the arrivals that did not wait

  void start();            // a new block
  void check_end() const;  // by its last thread: an incomplete barrier is a fault
};

// Waits at barrier `id` of the block, for num_threads threads in whole warps. The lanes of a warp
// must have the same step; at barrier 0 all warps must.
void barrier(int id, int num_threads, const Step& step);
// Arrives without waiting.
void arrive_at_barrier(int id, int num_threads, const Step& step);

}  // namespace emulator
