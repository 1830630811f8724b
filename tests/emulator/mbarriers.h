// The mbarriers of a block: phases of arrivals and of bytes that copies bring.
//
// An mbarrier's own 8 bytes say only which of these states is its. What its arrivals release is
// what a wait acquires: all that came before in any phase that has ended.
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
  int initialiser;  // a thread, and its clock then
  int32_t init_clock;
  bool fenced = false;  // by fence_mbarrier_init
  int count;
  int pending;        // arrivals of this phase to come
  int64_t bytes = 0;  // expected in this phase and not there; below 0: there and not yet expected
  int phase = 0;
  int copies_under_way = 0;
  Arrivals arrivals;
  Knowledge released;  // by the phases that have ended
  std::vector<Thread*> waiting;
  // The last copy that ended, and the phases whose end somebody has waited for.
  Step copy{};
  int copy_phase = -1;
  int observed_phases = 0;
};

struct Mbarriers {
  std::vector<MbarrierState> states;

  // For the report of a deadlock: those that somebody waits for.
  std::string describe_waiting(const Block& block) const;
};

// ---- from a running thread; `barrier` is an mbarrier in shared memory ----

void init_mbarrier(void* barrier, int count, const Step& step);
void fence_mbarrier_init();
// One arrival; `bytes` more are expected.
void arrive_at_mbarrier(void* barrier, int bytes, const Step& step);
void wait_for_mbarrier(void* barrier, int parity, const Step& step);

// ---- for copies ----

int mbarrier_for_copy(void* barrier, const Step& step);  // its index
// The clock of copies that end now.
int32_t copy_clock(const Block& block, int mbarrier);
void end_copy_at_mbarrier(Block& block, int mbarrier, int bytes, const Step& step);

}  // namespace emulator
