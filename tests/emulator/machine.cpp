#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kStackSkewBytes = 5 * 64;
constexpr int kLanes = 32;

struct Warp {
  uint32_t ready = 0;      // lanes that can run
  int arrived = 0;         // lanes at a warp-wide instruction
  int first_arrival = -1;  // the lane whose step the others must have
};

struct RunningBlock : Block {
  std::vector<Warp> warps;
  int unfinished = 0;
  int slot = 0;
};

Thread* running = nullptr;

class Scheduler : public Machine {
 public:
  Scheduler(Grid grid, int num_threads, int shared_bytes, const std::function<void(char*)>& body)
      : grid_(grid), num_threads_(num_threads), shared_bytes_(shared_bytes), body_(body) {}

  Grid grid() const override { return grid_; }
  void run();

  // Called from fibers.
  void yield();
  void finish_thread();
  const std::function<void(char*)>& body() const { return body_; }
  void fail(const std::string& message) {
    if (failure_.empty()) failure_ = message;
  }

 private:
  void start_block(RunningBlock& block, int64_t linear);
  bool run_some_warp();
  bool wake_spinning();
  bool end_some_copy(bool surely);
  std::string deadlock() const;
  RunningBlock& slot(size_t i) { return *(*pool())[i]; }
  static std::vector<std::unique_ptr<RunningBlock>>* pool();
  static Stacks& stacks();

  Grid grid_;
  int num_threads_;
  int shared_bytes_;
  const std::function<void(char*)>& body_;
  std::vector<RunningBlock*> resident_;
  Context home_;
  std::mt19937_64 random_{settings().seed};
  std::string failure_;
  int patience_ = 0;  // the mean number of warp switches between completed copies
};

// Kept between launches: the bookkeeping of shared memory and the stacks are large.
std::vector<std::unique_ptr<RunningBlock>>* Scheduler::pool() {
  static std::vector<std::unique_ptr<RunningBlock>> blocks;
  return &blocks;
}
Stacks& Scheduler::stacks() {
  static Stacks all(kStackBytes);
  return all;
}

Scheduler* scheduler_of(const Thread& thread) {
  return static_cast<Scheduler*>(thread.block->machine);
}
RunningBlock& block_of(const Thread& thread) { return *static_cast<RunningBlock*>(thread.block); }
Warp& warp_of(const Thread& thread) { return block_of(thread).warps[thread.thread_idx / kLanes]; }

// The first code of each fiber.
void thread_main() {
  on_entry();
  Thread& thread = *running;
  Scheduler& scheduler = *scheduler_of(thread);
  try {
    scheduler.body()(block_of(thread).shared.data());
    if (!thread.copies.copies.empty()) {
      fault(thread.copies.copies.front().step, "the thread ended before it waited for this copy");
    }
    const bool last = block_of(thread).unfinished == 1;
    check_end_of_copies(last);
    check_end_of_products();
    if (last) {
      check_end_of_registers(block_of(thread));
      block_of(thread).barriers.check_end();
    }
  } catch (const std::exception& error) {
    scheduler.fail(error.what());
  }
  thread.done = true;
  --block_of(thread).unfinished;
  scheduler.finish_thread();
}

void Scheduler::start_block(RunningBlock& block, int64_t linear) {
  block.machine = this;
  block.thread_count = num_threads_;
  block.index = {static_cast<int>(linear % grid_.x), static_cast<int>(linear / grid_.x % grid_.y),
                 static_cast<int>(linear / grid_.x / grid_.y)};
  block.threads.assign(num_threads_, Thread{});
  block.warps.assign(num_threads_ / kLanes, Warp{});
  block.barriers.start();
  for (Warpgroup& warpgroup : block.warpgroups) warpgroup.start();
  block.unfinished = num_threads_;
  block.mbarriers.states.clear();
  block.copies.under_way.clear();
  block.registers.start(num_threads_ / kLanes);
  block.shared.check_races = settings().check_races;
  block.shared.start(shared_bytes_, num_threads_ / kLanes);
  for (int i = 0; i < num_threads_; ++i) {
    Thread& thread = block.threads[i];
    thread.thread_idx = i;
    thread.block = &block;
    // The stacks' tops differ by a few cache lines, so that the frames of a warp's lanes do not map
    // to the same cache sets.
    thread.context =
        make_context(stacks().bottom(static_cast<size_t>(block.slot) * num_threads_ + i),
                     kStackBytes - i % kLanes * kStackSkewBytes, thread_main);
    wake(thread);
  }
}

void Scheduler::run() {
  const int64_t num_blocks = int64_t{1} * grid_.x * grid_.y * grid_.z;
  const size_t slots = std::max(settings().resident_blocks, 1);
  while (pool()->size() < slots) pool()->push_back(std::make_unique<RunningBlock>());
  stacks().reserve(slots * num_threads_);
  std::vector<RunningBlock*> free;
  for (size_t i = slots; i-- > 0;) {
    slot(i).slot = static_cast<int>(i);
    free.push_back(&slot(i));
  }
  int64_t next = 0;
  while (true) {
    while (!free.empty() && next < num_blocks) {
      start_block(*free.back(), next++);
      resident_.push_back(free.back());
      free.pop_back();
    }
    if (resident_.empty()) return;
    end_some_copy(false);
    if (!run_some_warp() && !wake_spinning() && !end_some_copy(true)) fail(deadlock());
    if (!failure_.empty()) throw Fault(failure_);
    for (size_t i = resident_.size(); i-- > 0;) {
      if (resident_[i]->unfinished > 0) continue;
      free.push_back(resident_[i]);
      resident_.erase(resident_.begin() + i);
      ++settings().blocks_run;
    }
  }
}

// Runs one warp, drawn from those that can run, until all its lanes wait or are done.
bool Scheduler::run_some_warp() {
  std::vector<Thread*> candidates;
  for (RunningBlock* block : resident_) {
    for (size_t warp = 0; warp < block->warps.size(); ++warp) {
      if (block->warps[warp].ready != 0) candidates.push_back(&block->threads[warp * kLanes]);
    }
  }
  if (candidates.empty()) return false;
  Thread& first_lane = *candidates[random_() % candidates.size()];
  Warp& warp = warp_of(first_lane);
  while (warp.ready != 0 && failure_.empty()) {
    // Starts with a random ready lane; then each lane switches to the next (yield).
    const int shift = static_cast<int>(random_() % kLanes);
    const uint32_t rotated =
        warp.ready >> shift | (shift == 0 ? 0 : warp.ready << (kLanes - shift));
    const int lane = (__builtin_ctz(rotated) + shift) % kLanes;
    running = &first_lane + lane;
    warp.ready &= ~(uint32_t{1} << lane);
    switch_context(home_, running->context);
  }
  return true;
}

// Called by a fiber that waits or is done: switches to the next ready lane of its warp, else to the
// scheduler.
void Scheduler::yield() {
  Thread& me = *running;
  Warp& warp = warp_of(me);
  if (warp.ready != 0 && failure_.empty()) {
    const int lane = __builtin_ctz(warp.ready);
    warp.ready &= ~(uint32_t{1} << lane);
    running = &block_of(me).threads[me.thread_idx / kLanes * kLanes + lane];
    switch_context(me.context, running->context);
  } else {
    switch_context(me.context, home_);
  }
}

void Scheduler::finish_thread() {
  while (true) yield();  // never resumed
}

// Wakes the threads in semaphore_wait whose semaphore has the value.
bool Scheduler::wake_spinning() {
  bool woken = false;
  for (RunningBlock* block : resident_) {
    for (Thread& thread : block->threads) {
      if (thread.waiting && thread.semaphore != nullptr && *thread.semaphore == thread.awaited) {
        thread.semaphore = nullptr;
        wake(thread);
        woken = true;
      }
    }
  }
  return woken;
}

// Completes one pending copy of some block: always if `surely`, else with a probability that
// depends on the seed, so that copies are late with some seeds and early with others.
bool Scheduler::end_some_copy(bool surely) {
  size_t count = 0;
  for (const RunningBlock* block : resident_) count += block->copies.under_way.size();
  if (count == 0) return false;
  if (patience_ == 0) patience_ = 1 << random_() % 4 * 2;
  if (!surely && random_() % patience_ != 0) return false;
  size_t which = random_() % count;
  for (RunningBlock* block : resident_) {
    const size_t here = block->copies.under_way.size();
    if (which < here) {
      end_copy(*block, which);
      return true;
    }
    which -= here;
  }
  return false;
}

std::string Scheduler::deadlock() const {
  std::ostringstream text;
  text << "deadlock";
  for (const RunningBlock* block : resident_) {
    text << ": block (" << block->index.x << ", " << block->index.y << ", " << block->index.z
         << "):";
    for (size_t warp = 0; warp < block->warps.size(); ++warp) {
      std::vector<std::pair<std::string, int>> places;
      for (int lane = 0; lane < kLanes; ++lane) {
        const Thread& thread = block->threads[warp * kLanes + lane];
        const std::string place = thread.done ? "done" : describe(*thread.step);
        if (places.empty() || places.back().first != place) places.emplace_back(place, 0);
        ++places.back().second;
      }
      text << (warp == 0 ? " warp " : "; warp ") << warp << ":";
      const char* separator = " ";
      for (const auto& [place, count] : places) {
        text << separator << count << " lanes " << place;
        separator = ", ";
      }
    }
    text << block->mbarriers.describe_waiting(*block) << block->registers.describe_waiting();
  }
  return text.str();
}

}  // namespace

Settings& settings() {
  static Settings all;
  return all;
}

void run_grid(Grid grid, int num_threads, int shared_bytes,
              const std::function<void(char*)>& body) {
  if (num_threads % kLanes != 0 || num_threads > kMaxWarps * kLanes) {
    throw Fault("a block of " + std::to_string(num_threads) + " threads");
  }
  struct NobodyRuns {
    ~NobodyRuns() { running = nullptr; }
  } afterwards;
  Scheduler(grid, num_threads, shared_bytes, body).run();
}

Thread& current() { return *running; }
PackLog* pack_log() { return running == nullptr ? nullptr : running->packs; }

void wake(Thread& thread) {
  thread.waiting = false;
  warp_of(thread).ready |= uint32_t{1} << (thread.thread_idx % kLanes);
}

void wait_here(const Step& step) {
  running->step = &step;
  running->waiting = true;
  scheduler_of(*running)->yield();
}

void fault(const Step& step, const std::string& what) {
  const Thread& thread = *running;
  const Grid at = thread.block->index;
  std::ostringstream text;
  text << describe(step) << ": " << what << " [block (" << at.x << ", " << at.y << ", " << at.z
       << "), thread " << thread.thread_idx << "]";
  throw Fault(text.str());
}

// A separate function, so that a lane that only arrives keeps nothing on its stack and switches to
// the next lane at once.
[[gnu::noinline]] static void execute_for_warp(Thread* lanes, void (*execute)(void* const* lanes)) {
  if (execute != nullptr) {
    void* all[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) all[lane] = lanes[lane].operands;
    execute(all);
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane].waiting = false;
  Warp& warp = warp_of(*running);
  warp.arrived = 0;
  warp.ready |= ~(uint32_t{1} << (running->thread_idx % kLanes));
}

[[noreturn, gnu::noinline]] static void lanes_part(const Thread& first, const Thread& me) {
  fault(*me.step, "lanes of a warp part: " +
                      difference(first.thread_idx, *first.step, me.thread_idx, *me.step));
}

// Returns true in the last lane of the warp to arrive. Other lanes wait here, and get false.
static inline bool last_of_warp(const Step& step, void* operands) {
  Thread& me = *running;
  Warp& warp = warp_of(me);
  Thread* lanes = &me - me.thread_idx % kLanes;
  me.operands = operands;
  me.step = &step;
  if (warp.arrived == 0) {
    warp.first_arrival = me.thread_idx % kLanes;
  } else if (!same(*lanes[warp.first_arrival].step, step)) {
    lanes_part(lanes[warp.first_arrival], me);
  }
  if (++warp.arrived == kLanes) return true;
  me.waiting = true;
  scheduler_of(me)->yield();
  return false;
}

void collective(const Step& step, void* operands, void (*execute)(void* const* lanes)) {
  if (last_of_warp(step, operands)) {
    execute_for_warp(running - running->thread_idx % kLanes, execute);
  }
}

bool gather_warp(const Step& step, void* operands) {
  if (!last_of_warp(step, operands)) return false;
  warp_of(*running).arrived = 0;
  return true;
}

void warp_is_ordered() {
  block_of(*running).shared.clocks().order_lanes(running->thread_idx / kLanes);
}

void wait_until_equal(const int* semaphore, int value, const Step& step) {
  Thread& me = *running;
  if (*semaphore == value) return;
  me.semaphore = semaphore;
  me.awaited = value;
  wait_here(step);
}

}  // namespace emulator
