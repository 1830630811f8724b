// The mbarriers of a block: phases of arrivals and of copied bytes.
//
// An mbarrier's own 8 bytes hold only the index of its state. Arrivals release, and a wait
// acquires: after it, all accesses before the arrivals of every completed phase are ordered.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

struct Block;
struct Thread;

struct MbarrierState {
  const void* address;
  Step init;
  int initialiser;  // the thread; init_clock is its clock then
  int32_t init_clock;
  bool fenced = false;  // by fence_mbarrier_init
  int count;
  int pending;        // arrivals that this phase still waits for
  int64_t bytes = 0;  // bytes that it still waits for; below 0: copied before they were expected
  int phase = 0;
  int copies_under_way = 0;
  Arrivals arrivals;
  Knowledge released;  // by the completed phases
  std::vector<Thread*> waiting;
  // The last completed copy and its phase; the number of phases that somebody has waited for.
  Step copy{};
  int copy_phase = -1;
  int observed_phases = 0;
};

struct Mbarriers {
  std::vector<MbarrierState> states;

  // For the report of a deadlock: the mbarriers at which threads wait.
  std::string describe_waiting(const Block& block) const;
};

// ---- from a running thread; `barrier` is an mbarrier in shared memory ----

void init_mbarrier(void* barrier, int count, const Step& step);
void fence_mbarrier_init();
// One arrival, which also expects `bytes` bytes.
void arrive_at_mbarrier(void* barrier, int bytes, const Step& step);
void wait_for_mbarrier(void* barrier, int parity, const Step& step);

// ---- for copies ----

int mbarrier_for_copy(void* barrier, const Step& step);  // its index
// The clock of copies that complete now.
int32_t copy_clock(const Block& block, int mbarrier);
void end_copy_at_mbarrier(Block& block, int mbarrier, int bytes, const Step& step);

}  // namespace emulator
