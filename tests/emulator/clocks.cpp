#include "emulator/clocks.h"

#include <algorithm>

namespace emulator {

void Knowledge::add(const Knowledge& more) {
  for (int warp = 0; warp < kMaxWarps; ++warp)
    warps[warp] = std::max(warps[warp], more.warps[warp]);
  size_t at = 0;
  for (const Entry& entry : more.others) {
    while (at < others.size() && others[at].actor < entry.actor) ++at;
    if (at < others.size() && others[at].actor == entry.actor) {
      others[at].clock = std::max(others[at].clock, entry.clock);
    } else {
      others.insert(others.begin() + static_cast<std::ptrdiff_t>(at), entry);
    }
  }
}

void Knowledge::add(Actor actor, int32_t clock) {
  size_t at = 0;
  while (at < others.size() && others[at].actor < actor) ++at;
  if (at < others.size() && others[at].actor == actor) {
    others[at].clock = std::max(others[at].clock, clock);
  } else {
    others.insert(others.begin() + static_cast<std::ptrdiff_t>(at), Entry{actor, clock});
  }
}

int32_t Knowledge::clock_of(Actor actor) const {
  for (const Entry& entry : others) {
    if (entry.actor == actor) return entry.clock;
  }
  return 0;
}

// If all lanes of a warp arrived, the warp's entry stands for all of them. Accesses of a lane
// between its own arrival and the last lane's then count as earlier; those of the last lane do not.
void Arrivals::close() {
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    for (int lane = 0; lanes[warp] != 0 && lane < 32; ++lane) {
      const int thread = warp * 32 + lane;
      if (lanes[warp] == ~uint32_t{0}) {
        known.warps[warp] = std::max(known.warps[warp], clock[thread]);
      } else if ((lanes[warp] >> lane & 1) != 0) {
        known.add(thread, clock[thread]);
      }
    }
    lanes[warp] = 0;
  }
  const auto told = [&](const Knowledge::Entry& entry) {
    return entry.actor < kMaxThreads && entry.clock <= known.warps[entry.actor / 32];
  };
  known.others.erase(std::remove_if(known.others.begin(), known.others.end(), told),
                     known.others.end());
}

void Clocks::start(int num_warps, int32_t base) {
  num_warps_ = num_warps;
  latest_ = base + 1;
  WarpClock clock{};
  for (int32_t& known : clock.known) known = base;
  clock.lanes = latest_;
  clock.floor = base;
  warps_.assign(num_warps, clock);
  for (int warp = 0; warp < num_warps; ++warp) warps_[warp].known[warp] = latest_;
  if (single_threads_know_) threads_.clear();
  single_threads_know_ = false;
  std::fill_n(to_merge_, kMaxWarps, false);
  std::fill_n(tensor_clock_, kMaxWarps / kWarpgroupWarps, 0);
}

void Clocks::tick(int warp) { latest_ = std::max(latest_, ++warps_[warp].known[warp]); }

bool Clocks::knows(Actor earlier, int32_t clock, int thread) const {
  if (earlier >= kMaxThreads && earlier == tensor_cores(thread / kWarpgroupThreads)) return true;
  const Knowledge& mine = threads_[thread];
  if (earlier < kMaxThreads && clock <= mine.warps[earlier / 32]) return true;
  return clock <= mine.clock_of(earlier);
}

int32_t Clocks::known_clock(int warp, int thread) const {
  const WarpClock& mine = warps_[thread / 32];
  const int32_t known = warp == thread / 32 ? mine.lanes - 1 : mine.known[warp];
  return single_threads_know_ ? std::max(known, threads_[thread].warps[warp]) : known;
}

void Clocks::order_lanes(int warp) {
  tick(warp);
  WarpClock& clock = warps_[warp];
  clock.lanes = clock.known[warp];
  if (!to_merge_[warp]) return;
  to_merge_[warp] = false;
  Knowledge all;
  for (int lane = 0; lane < 32; ++lane) all.add(threads_[warp * 32 + lane]);
  for (int lane = 0; lane < 32; ++lane) threads_[warp * 32 + lane] = all;
  for (int i = 0; i < num_warps_; ++i) {
    if (i != warp) clock.known[i] = std::max(clock.known[i], all.warps[i]);
  }
}

void Clocks::order_warps(const std::vector<int>& warps, const Knowledge* more) {
  WarpClock joined{};
  for (const int warp : warps) {
    for (int i = 0; i < num_warps_; ++i) {
      joined.known[i] = std::max(joined.known[i], warps_[warp].known[i]);
    }
  }
  if (more != nullptr || single_threads_know_) {
    Knowledge all;
    if (more != nullptr) all.add(*more);
    for (const int warp : warps) {
      release_tensor_cores(warp / kWarpgroupWarps, all);
      for (int lane = 0; lane < 32 && single_threads_know_; ++lane) {
        // Unless to_merge_, all lanes of the warp have the same knowledge.
        if (lane == 0 || to_merge_[warp]) all.add(threads_[warp * 32 + lane]);
      }
    }
    for (const int warp : warps) {
      for (int lane = 0; lane < 32; ++lane) acquire(warp * 32 + lane, all);
      to_merge_[warp] = false;
    }
    for (int i = 0; i < num_warps_; ++i) joined.known[i] = std::max(joined.known[i], all.warps[i]);
  }
  // All warps of the barrier continue at the same clock, so that the floor covers their accesses.
  int32_t now = 0;
  for (const int warp : warps) now = std::max(now, joined.known[warp]);
  for (const int warp : warps) joined.known[warp] = now;
  joined.floor = *std::min_element(joined.known, joined.known + num_warps_);
  for (const int warp : warps) warps_[warp] = joined;
  for (const int warp : warps) order_lanes(warp);
}

void Clocks::arrive(int thread, Arrivals& arrivals) {
  const int warp = thread / 32;
  WarpClock& mine = warps_[warp];
  Knowledge& known = arrivals.known;
  for (int i = 0; i < num_warps_; ++i)
    known.warps[i] = std::max(known.warps[i], known_clock(i, thread));
  if (single_threads_know_) known.add(threads_[thread]);
  release_tensor_cores(warp / kWarpgroupWarps, known);
  arrivals.lanes[warp] |= uint32_t{1} << thread % 32;
  arrivals.clock[thread] = mine.known[warp];
  tick(warp);
}

void Clocks::acquire(int thread, const Knowledge& knowledge) {
  if (threads_.empty()) threads_.resize(static_cast<size_t>(num_warps_) * 32);
  single_threads_know_ = true;
  threads_[thread].add(knowledge);
  to_merge_[thread / 32] = true;
}

int32_t Clocks::tensor_clock(int warpgroup) {
  if (threads_.empty()) threads_.resize(static_cast<size_t>(num_warps_) * 32);
  single_threads_know_ = true;
  if (tensor_clock_[warpgroup] == 0) tensor_clock_[warpgroup] = ++latest_;
  return tensor_clock_[warpgroup];
}

void Clocks::release_tensor_cores(int warpgroup, Knowledge& into) {
  if (tensor_clock_[warpgroup] == 0) return;
  into.add(tensor_cores(warpgroup), tensor_clock_[warpgroup]);
  latest_ = std::max(latest_, ++tensor_clock_[warpgroup]);
}

}  // namespace emulator
