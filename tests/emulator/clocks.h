// The happens-before order of a block's accesses, as vector clocks.
//
// Each warp has a clock. A barrier at which all threads wait tells each warp the others' clocks.
// Most accesses need only a comparison with the floor: the clock up to which all accesses are
// ordered. A thread that waits for an mbarrier learns clocks alone; its warp learns them when its
// lanes meet in sync_warp or at a barrier.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

constexpr int kMaxWarps = 16;
constexpr int kMaxThreads = kMaxWarps * 32;
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupThreads = kWarpgroupWarps * 32;

// Whoever accesses memory: a thread (its index), the tensor cores of a warpgroup, or the copies
// that complete on one mbarrier.
using Actor = int;
constexpr Actor tensor_cores(int warpgroup) { return kMaxThreads + warpgroup; }
constexpr Actor copies_of(int mbarrier) {
  return kMaxThreads + kMaxWarps / kWarpgroupWarps + mbarrier;
}

struct WarpClock {
  // For each warp: its accesses up to this clock are ordered before this warp's next one. This
  // warp's own entry is its current clock.
  int32_t known[kMaxWarps];
  int32_t lanes;  // this warp's own accesses below this clock are ordered before, too
  int32_t floor;  // all warps' accesses up to this clock are ordered before
};

// A set of ordered accesses: those of all lanes of a warp up to a clock, and those of single
// actors.
struct Knowledge {
  struct Entry {
    Actor actor;
    int32_t clock;
  };
  int32_t warps[kMaxWarps] = {};
  std::vector<Entry> others;  // sorted by actor

  void add(const Knowledge& more);
  void add(Actor actor, int32_t clock);
  int32_t clock_of(Actor actor) const;  // 0 for one that is not known
};

// Threads that arrived at a barrier without waiting.
struct Arrivals {
  Knowledge known;
  uint32_t lanes[kMaxWarps] = {};  // the lanes of each warp that arrived
  int32_t clock[kMaxThreads] = {};

  // Adds their accesses before the arrival to `known`.
  void close();
};

class Clocks {
 public:
  // Clocks up to `base` belong to earlier blocks.
  void start(int num_warps, int32_t base);
  const WarpClock& of_warp(int warp) const { return warps_[warp]; }
  int32_t now(int thread) const { return warps_[thread / 32].known[thread / 32]; }
  int32_t latest() const { return latest_; }
  // Whether the access of `earlier` at `clock` is ordered before `thread` now.
  bool ordered(Actor earlier, int32_t clock, int thread) const {
    if (earlier == thread) return true;
    if (earlier < kMaxThreads) {
      const WarpClock& mine = warps_[thread / 32];
      const int warp = earlier / 32;
      if (warp == thread / 32 ? clock < mine.lanes : clock <= mine.known[warp]) return true;
    }
    return single_threads_know_ && knows(earlier, clock, thread);
  }
  // The warp's accesses up to this clock are ordered before `thread` now.
  int32_t known_clock(int warp, int thread) const;
  bool single_threads_know() const { return single_threads_know_; }

  void order_lanes(int warp);
  // A barrier of these warps, after which they also know `more`.
  void order_warps(const std::vector<int>& warps, const Knowledge* more);
  void arrive(int thread, Arrivals& arrivals);
  void acquire(int thread, const Knowledge& knowledge);

  // The clock at which the tensor cores of a warpgroup read. For the warpgroup's own threads these
  // reads are always ordered.
  int32_t tensor_clock(int warpgroup);

 private:
  bool knows(Actor earlier, int32_t clock, int thread) const;
  void tick(int warp);
  void release_tensor_cores(int warpgroup, Knowledge& into);

  int num_warps_ = 0;
  int32_t latest_ = 0;
  bool single_threads_know_ = false;  // whether some thread knows more than its warp, in this block
  std::vector<WarpClock> warps_;
  std::vector<Knowledge> threads_;
  bool to_merge_[kMaxWarps] = {};  // whether a lane has learned a clock since its warp last met
  int32_t tensor_clock_[kMaxWarps / kWarpgroupWarps] = {};  // 0: never used in this block
};

}  // namespace emulator
