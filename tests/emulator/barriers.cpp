#include "emulator/barriers.h"

#include <string>
#include <vector>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr int kLanes = 32;

struct Call {
  int id;
  int num_threads;
};
const Call& call_of(const Thread& lane) { return *static_cast<const Call*>(lane.operands); }

Thread* lanes_of(Block& block, int warp) { return &block.threads[warp * kLanes]; }

void wake_others(Block& block, int warp) {
  for (int lane = 0; lane < kLanes; ++lane) {
    Thread& thread = lanes_of(block, warp)[lane];
    if (&thread != &current()) wake(thread);
  }
}

// Checks the arguments of the running lane, the last of its warp, against those of the others.
void check_call(const Call& call, const Step& step) {
  Block& block = *current().block;
  if (call.id < 0 || call.id >= Barriers::kCount) {
    fault(step, "barrier " + std::to_string(call.id) + " of " + std::to_string(Barriers::kCount));
  }
  if (call.num_threads <= 0 || call.num_threads % kLanes != 0 ||
      call.num_threads > block.num_threads()) {
    fault(step, "a barrier for " + std::to_string(call.num_threads) + " threads");
  }
  const Thread* lanes = lanes_of(block, current().thread_idx / kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Call& other = call_of(lanes[lane]);
    if (other.id == call.id && other.num_threads == call.num_threads) continue;
    fault(step, "lanes of a warp come to barrier " + std::to_string(call.id) + " for " +
                    std::to_string(call.num_threads) + " threads, and to barrier " +
                    std::to_string(other.id) + " for " + std::to_string(other.num_threads));
  }
}

// The barrier is complete: wakes all waiting lanes. The running lane does not wait.
void open(Block& block, int id) {
  Barrier& barrier = block.barriers.of[id];
  std::vector<int> warps;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    if ((barrier.waits >> warp & 1) == 0) continue;
    warps.push_back(warp);
    wake_others(block, warp);
  }
  Clocks& clocks = block.shared.clocks();
  if (barrier.waits != barrier.came) {
    Arrivals& went_on = block.barriers.went_on[id];
    went_on.close();
    if (!warps.empty()) clocks.order_warps(warps, &went_on.known);
    went_on = Arrivals{};
  } else {
    clocks.order_warps(warps, nullptr);
  }
  barrier = Barrier{};
}

// The warp of the running lane arrives; its other lanes wait. Returns whether the barrier is
// complete.
bool come(const Call& call, bool waits, const Step& step) {
  check_call(call, step);
  const int thread = current().thread_idx;
  const int warp = thread / kLanes;
  Block& block = *current().block;
  Barrier& barrier = block.barriers.of[call.id];
  if (barrier.came == 0) {
    barrier.num_threads = call.num_threads;
    barrier.first_thread = thread;
    barrier.first = step;
  }
  if (barrier.num_threads != call.num_threads || (call.id == 0 && !same(barrier.first, step))) {
    fault(step, "threads meet at different barriers: " +
                    difference(barrier.first_thread, barrier.first, thread, step));
  }
  const uint32_t bit = uint32_t{1} << warp;
  if ((barrier.came & bit) != 0) {
    fault(step, "warp " + std::to_string(warp) + " comes to barrier " + std::to_string(call.id) +
                    " again before all others came");
  }
  barrier.came |= bit;
  if (waits) {
    barrier.waits |= bit;
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      block.shared.clocks().arrive(warp * kLanes + lane, block.barriers.went_on[call.id]);
    }
  }
  if (__builtin_popcount(barrier.came) * kLanes < call.num_threads) return false;
  open(block, call.id);
  return true;
}

}  // namespace

void Barriers::start() {
  for (int id = 0; id < kCount; ++id) {
    if (of[id].waits != of[id].came) went_on[id] = Arrivals{};  // of a block that failed
    of[id] = Barrier{};
  }
}

void Barriers::check_end() const {
  for (const Barrier& barrier : of) {
    if (barrier.came == 0) continue;
    fault(barrier.first, "the block ended before all threads came to this barrier");
  }
}

void barrier(int id, int num_threads, const Step& step) {
  Call call{id, num_threads};
  if (gather_warp(step, &call) && !come(call, true, step)) wait_here(step);
}

void arrive_at_barrier(int id, int num_threads, const Step& step) {
  Call call{id, num_threads};
  if (!gather_warp(step, &call)) return;
  come(call, false, step);
  wake_others(*current().block, current().thread_idx / kLanes);
}

}  // namespace emulator
