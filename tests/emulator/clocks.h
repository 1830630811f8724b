// What comes before what in a block, as vector clocks.
//
// Warps have clocks. A barrier that all its threads wait at tells each of their warps the others'
// clocks; these ticks are the floor that most accesses are compared with. What a single thread
// learns beyond its warp, from an mbarrier that it waits for, is its own until its warp's lanes
// meet in sync_warp or at a barrier.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

constexpr int kMaxWarps = 16;
constexpr int kMaxThreads = kMaxWarps * 32;
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupThreads = kWarpgroupWarps * 32;

// Who accesses memory: a thread by its index, the tensor cores of a warpgroup, the copies that
// announce their bytes to one mbarrier.
using Actor = int;
constexpr Actor tensor_cores(int warpgroup) { return kMaxThreads + warpgroup; }
constexpr Actor copies_of(int mbarrier) {
  return kMaxThreads + kMaxWarps / kWarpgroupWarps + mbarrier;
}

struct WarpClock {
  // Of each warp, its accesses up to this clock come before what I do now; my own entry is what I
  // do now.
  int32_t seen[kMaxWarps];
  int32_t lanes;  // my warp's accesses below this clock come before
  int32_t floor;  // all warps' accesses up to this clock come before
};

// Accesses that come before: of all lanes of a warp up to a clock, and of single actors.
struct Knowledge {
  struct Entry {
    Actor actor;
    int32_t clock;
  };
  int32_t seen[kMaxWarps] = {};
  std::vector<Entry> others;  // in the order of actors

  void add(const Knowledge& more);
  void add(Actor actor, int32_t clock);
  int32_t clock_of(Actor actor) const;  // 0 for one that is not known
};

// Threads that came to a barrier and went on.
struct Arrivals {
  Knowledge known;
  uint32_t lanes[kMaxWarps] = {};  // which lanes of each warp came
  int32_t clock[kMaxThreads] = {};

  // Moves what they did before they came into `known`.
  void close();
};

class Clocks {
 public:
  // Clocks up to `base` are of earlier blocks.
  void start(int num_warps, int32_t base);
  const WarpClock& of_warp(int warp) const { return warps_[warp]; }
  int32_t now(int thread) const { return warps_[thread / 32].seen[thread / 32]; }
  int32_t latest() const { return latest_; }
  // Whether what `earlier` did at `clock` comes before what `thread` does now.
  bool ordered(Actor earlier, int32_t clock, int thread) const {
    if (earlier == thread) return true;
    if (earlier < kMaxThreads) {
      const WarpClock& mine = warps_[thread / 32];
      const int warp = earlier / 32;
      if (warp == thread / 32 ? clock < mine.lanes : clock <= mine.seen[warp]) return true;
    }
    return single_threads_know_ && knows(earlier, clock, thread);
  }
  // Of the warp's accesses, those up to this clock come before what `thread` does now.
  int32_t seen(int warp, int thread) const;
  bool single_threads_know() const { return single_threads_know_; }

  void order_lanes(int warp);
  // A barrier of these warps; `more` comes before what they do now, too.
  void order_warps(const std::vector<int>& warps, const Knowledge* more);
  void arrive(int thread, Arrivals& arrivals);
  void acquire(int thread, const Knowledge& knowledge);

  // The clock at which the tensor cores of a warpgroup read; its own threads need not know it.
  int32_t tensor_clock(int warpgroup);

 private:
  bool knows(Actor earlier, int32_t clock, int thread) const;
  void tick(int warp);
  void release_tensor_cores(int warpgroup, Knowledge& into);

  int num_warps_ = 0;
  int32_t latest_ = 0;
  bool single_threads_know_ = false;  // anything of their own, in this block
  std::vector<WarpClock> warps_;
  std::vector<Knowledge> threads_;
  bool to_merge_[kMaxWarps] = {};  // whether a lane has learned something since its warp last met
  int32_t tensor_clock_[kMaxWarps / kWarpgroupWarps] = {};  // 0: never used in this block
};

}  // namespace emulator
