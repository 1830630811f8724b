#include "emulator/mbarriers.h"

#include <cstring>
#include <sstream>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes
constexpr uint64_t kMark = 0x6d62;        // in the top bits of an mbarrier's 8 bytes

std::string thread_name(int thread) { return "thread " + std::to_string(thread); }

void check_address(const void* barrier, const Step& step) {
  const Block& block = *current().block;
  const int64_t offset = block.shared.offset_of(barrier);
  if (offset < 0 || offset + 8 > block.shared.size()) {
    fault(step, "an mbarrier outside of shared memory: byte " + std::to_string(offset) + " of " +
                    std::to_string(block.shared.size()));
  }
  if (offset % 8 != 0) {
    fault(step, "an mbarrier at shared byte " + std::to_string(offset) +
                    ", which is not aligned to 8 bytes");
  }
}

// The index of an mbarrier's state; -1 if there is no mbarrier at the address.
int index_of(const void* barrier) {
  uint64_t word;
  memcpy(&word, barrier, sizeof(word));
  const std::vector<MbarrierState>& states = current().block->mbarriers.states;
  const auto index = static_cast<uint32_t>(word);
  if (word >> 48 != kMark || index >= states.size() || states[index].address != barrier) return -1;
  return static_cast<int>(index);
}

// The index of an mbarrier's state, if this thread may use it; else a fault.
int find(const void* barrier, const Step& step, bool for_copy) {
  check_address(barrier, step);
  const int index = index_of(barrier);
  Block& block = *current().block;
  if (index < 0) {
    fault(step, "an mbarrier at shared byte " + std::to_string(block.shared.offset_of(barrier)) +
                    " that nobody has initialised");
  }
  const MbarrierState& state = block.mbarriers.states[index];
  const int thread = current().thread_idx;
  const std::string of =
      "the mbarrier of " + thread_name(state.initialiser) + " in " + describe(state.init);
  if ((thread != state.initialiser || for_copy) && !state.fenced) {
    fault(step, of + " is used before that thread's fence_mbarrier_init");
  }
  if (block.shared.check_races &&
      !block.shared.clocks().ordered(state.initialiser, state.init_clock, thread)) {
    fault(step, "a race: " + of + " is used, and no barrier comes in between");
  }
  return index;
}

void end_phase_if_complete(Block& block, int index) {
  MbarrierState& state = block.mbarriers.states[index];
  if (state.pending != 0 || state.bytes != 0) return;
  if (state.copy_phase == state.phase) {
    state.arrivals.known.add(copies_of(index), copy_clock(block, index));
  }
  state.arrivals.close();
  state.released.add(state.arrivals.known);
  ++state.phase;
  state.pending = state.count;
  if (!state.waiting.empty()) state.observed_phases = state.phase;
  for (Thread* thread : state.waiting) {
    block.shared.clocks().acquire(thread->thread_idx, state.released);
    wake(*thread);
  }
  state.waiting.clear();
}

}  // namespace

void init_mbarrier(void* barrier, int count, const Step& step) {
  check_address(barrier, step);
  if (count < 1 || count > kMaxCount) {
    fault(step, "an mbarrier for " + std::to_string(count) + " arrivals");
  }
  Block& block = *current().block;
  std::vector<MbarrierState>& states = block.mbarriers.states;
  const int thread = current().thread_idx;
  const int before = index_of(barrier);
  if (before >= 0) {
    const MbarrierState& old = states[before];
    if (!old.waiting.empty()) {
      fault(step, "the mbarrier of " + describe(old.init) + ", for which " +
                      thread_name(old.waiting.front()->thread_idx) + " waits");
    }
    if (old.pending != old.count || old.bytes != 0 || old.copies_under_way != 0) {
      fault(step, "the mbarrier of " + describe(old.init) + " in the middle of a phase");
    }
  } else if (!block.shared.begin_mbarrier(barrier, thread, step)) {
    fault(step, block.shared.error());
  }
  const uint64_t word = kMark << 48 | states.size();
  memcpy(barrier, &word, sizeof(word));
  MbarrierState state{};
  state.address = barrier;
  state.init = step;
  state.initialiser = thread;
  state.init_clock = block.shared.clocks().now(thread);
  state.count = count;
  state.pending = count;
  state.copy_phase = -1;
  states.push_back(std::move(state));
}

void fence_mbarrier_init() {
  for (MbarrierState& state : current().block->mbarriers.states) {
    if (state.initialiser == current().thread_idx) state.fenced = true;
  }
}

void arrive_at_mbarrier(void* barrier, int bytes, const Step& step) {
  const int index = find(barrier, step, false);
  Block& block = *current().block;
  MbarrierState& state = block.mbarriers.states[index];
  if (state.pending == 0) {
    fault(step, "more arrivals than the " + std::to_string(state.count) +
                    " of the mbarrier's phase " + std::to_string(state.phase) +
                    ", which waits for " + std::to_string(state.bytes) + " bytes");
  }
  state.bytes += bytes;
  if (bytes < 0 || state.bytes > kMaxCount) {
    fault(step, std::to_string(state.bytes) + " bytes expected at an mbarrier");
  }
  --state.pending;
  block.shared.clocks().arrive(current().thread_idx, state.arrivals);
  end_phase_if_complete(block, index);
}

void wait_for_mbarrier(void* barrier, int parity, const Step& step) {
  if (parity != 0 && parity != 1) fault(step, "parity " + std::to_string(parity));
  const int index = find(barrier, step, false);
  Block& block = *current().block;
  MbarrierState& state = block.mbarriers.states[index];
  if (state.phase % 2 == parity) {
    state.waiting.push_back(&current());
    return wait_here(step);
  }
  if (state.phase == 0) return;
  state.observed_phases = state.phase;
  block.shared.clocks().acquire(current().thread_idx, state.released);
}

int mbarrier_for_copy(void* barrier, const Step& step) {
  const int index = find(barrier, step, true);
  ++current().block->mbarriers.states[index].copies_under_way;
  return index;
}

int32_t copy_clock(const Block& block, int mbarrier) {
  return SharedMemory::kCopyClock + block.mbarriers.states[mbarrier].phase;
}

void end_copy_at_mbarrier(Block& block, int mbarrier, int bytes, const Step& step) {
  MbarrierState& state = block.mbarriers.states[mbarrier];
  --state.copies_under_way;
  state.copy = step;
  state.copy_phase = state.phase;
  state.bytes -= bytes;
  end_phase_if_complete(block, mbarrier);
}

std::string Mbarriers::describe_waiting(const Block& block) const {
  std::ostringstream text;
  for (const MbarrierState& state : states) {
    if (state.waiting.empty()) continue;
    text << "; the mbarrier of " << describe(state.init) << " (shared byte "
         << block.shared.offset_of(state.address) << ") in phase " << state.phase << ", parity "
         << state.phase % 2 << ": " << state.pending << " of " << state.count
         << " arrivals pending, " << state.bytes << " bytes expected, " << state.waiting.size()
         << " threads wait, first " << thread_name(state.waiting.front()->thread_idx);
  }
  return text.str();
}

}  // namespace emulator
