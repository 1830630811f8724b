#include "emulator/shared_memory.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr int kAlignment = 1024;
constexpr int32_t kClockLimit = 1 << 29;
int warp_of(int thread) { return thread / 32; }
uint32_t lane_bit(int thread) { return uint32_t{1} << (thread % 32); }
int num_units(int bytes) { return (bytes + kUnitBytes - 1) / kUnitBytes; }
std::string thread_name(int thread) { return "thread " + std::to_string(thread); }
std::string byte_name(int unit) { return "shared byte " + std::to_string(unit * kUnitBytes); }

}  // namespace

void SharedMemory::clear(int bytes, int num_warps) {
  bytes_ = std::max(bytes, bytes_);
  num_warps_ = std::max(num_warps, num_warps_);
  memory_.assign(bytes_ + kAlignment, 0);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
  data_ = memory_.data() + (kAlignment - address % kAlignment) % kAlignment;
  const int units = num_units(bytes_);
  write_clock_.assign(units, 0);
  writer_.assign(units, 0);
  write_step_.assign(units, kUnknownStep);
  read_clock_.assign(units, 0);
  for (int warp = 0; warp < num_warps_; ++warp) {
    reads_[warp].clock.assign(units, 0);
    reads_[warp].lanes.assign(units, 0);
    reads_[warp].step.assign(units, kUnknownStep);
  }
  base_ = 0;
  for (TensorReads& reads : tensor_reads_) reads = {};
}

void SharedMemory::start(int bytes, int num_warps) {
  const int32_t latest = clocks_.latest();
  const bool afresh = bytes > bytes_ || num_warps > num_warps_ || latest > kClockLimit;
  if (afresh) clear(bytes, num_warps);
  // Incomplete copies of a failed block, and copies of an earlier block.
  const auto of_a_copy = [](int32_t clock) { return clock >= kCopyClock; };
  std::replace_if(write_clock_.begin(), write_clock_.end(), of_a_copy, 0);
  if (async_) std::replace_if(read_clock_.begin(), read_clock_.end(), of_a_copy, 0);
  async_ = false;
  limit_ = bytes;
  block_warps_ = num_warps;
  memset(data_, 0xff, bytes);
  base_ = afresh ? 0 : latest;
  clocks_.start(num_warps, base_);
}

bool SharedMemory::refuse(const std::string& why) {
  error_ = why;
  return false;
}

bool SharedMemory::refuse_address(const char* access, int64_t offset, int bytes) {
  if (offset < 0 || offset + bytes > limit_) {
    return refuse(std::string(access) + " outside of shared memory: byte " +
                  std::to_string(offset) + " of " + std::to_string(limit_));
  }
  return refuse(std::string(access) + " of shared byte " + std::to_string(offset) +
                ", which is not aligned to " + std::to_string(bytes) + " bytes");
}

inline bool SharedMemory::find(const char* access, const void* address, int bytes, Units& units) {
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) -
                                           reinterpret_cast<uintptr_t>(data_));
  if (offset < 0 || offset + bytes > limit_ || (offset & (bytes - 1)) != 0) {
    return refuse_address(access, offset, bytes);
  }
  units.first = static_cast<int>(offset) / kUnitBytes;
  units.count = std::max(bytes / kUnitBytes, 1);
  return true;
}

std::string SharedMemory::writer_of(int unit) const {
  const std::string place = describe(write_step_[unit]);
  if (writer_[unit] >= kMaxThreads) return "the copy in " + place;
  return thread_name(writer_[unit]) + " in " + place;
}

// Whether all units hold a value whose write is ordered before `thread` now.
inline bool SharedMemory::all_written_before(const Units& units, int thread) const {
  for (int unit = units.first; unit < units.first + units.count; ++unit) {
    const int32_t clock = write_clock_[unit];
    if (clock >= kBarrier || clock <= base_) return false;
    if (!clocks_.ordered(writer_[unit], clock, thread)) return false;
  }
  return true;
}

bool SharedMemory::check_unit_to_read(int unit, int thread) {
  if (write_clock_[unit] == kCopying) {
    return refuse("a read of " + byte_name(unit) + " before the copy of " + writer_of(unit) +
                  " was waited for");
  }
  if (write_clock_[unit] <= base_) {
    return refuse("a read of " + byte_name(unit) + ", which nobody has written");
  }
  if (write_clock_[unit] == kBarrier) {
    return refuse("a read of " + byte_name(unit) + ", which is of the mbarrier of " +
                  writer_of(unit));
  }
  if (check_races && !clocks_.ordered(writer_[unit], write_clock_[unit], thread)) {
    if (writer_[unit] >= kMaxThreads) {
      return refuse("a read of " + byte_name(unit) + " before " + writer_of(unit) +
                    " was waited for");
    }
    return refuse("a race: " + byte_name(unit) + " was written by " + writer_of(unit) +
                  ", and no barrier comes before this read");
  }
  return true;
}

bool SharedMemory::check_unit_to_write(int unit, int thread) {
  if (write_clock_[unit] == kCopying) {
    return refuse("a write to " + byte_name(unit) + " before the copy of " + writer_of(unit) +
                  " was waited for");
  }
  if (write_clock_[unit] == kBarrier) {
    return refuse("a write to " + byte_name(unit) + ", which is of the mbarrier of " +
                  writer_of(unit));
  }
  if (check_races && write_clock_[unit] > base_ &&
      !clocks_.ordered(writer_[unit], write_clock_[unit], thread)) {
    if (writer_[unit] >= kMaxThreads) {
      return refuse("a write to " + byte_name(unit) + " before " + writer_of(unit) +
                    " was waited for");
    }
    return refuse("a race: " + byte_name(unit) + " was written by " + writer_of(unit) +
                  ", and no barrier comes before this write");
  }
  return true;
}

// Whether all reads of one warp are ordered before a write of `thread` now.
bool SharedMemory::check_reads_before_write(const Units& units, int warp, int thread) {
  const Reads& reads = reads_[warp];
  const bool mine = warp == warp_of(thread);
  const int32_t before = clocks_.known_clock(warp, thread);
  const int32_t* clock = reads.clock.data() + units.first;
  int32_t last = 0;
  for (int i = 0; i < units.count; ++i) last = clock[i] > last ? clock[i] : last;
  if (last <= before) return true;
  for (int unit = units.first; unit < units.first + units.count; ++unit) {
    if (reads.clock[unit] <= before) continue;
    uint32_t others = reads.lanes[unit] & ~(mine ? lane_bit(thread) : 0);
    for (int lane = 0; clocks_.single_threads_know() && lane < 32; ++lane) {
      if (clocks_.ordered(warp * 32 + lane, reads.clock[unit], thread)) {
        others &= ~(uint32_t{1} << lane);
      }
    }
    if (others == 0) continue;
    return refuse("a race: " + byte_name(unit) + " was read by " +
                  thread_name(warp * 32 + __builtin_ctz(others)) + " in " +
                  describe(reads.step[unit]) + ", and no barrier comes before this write");
  }
  return true;
}

// mark_read_here and mark_written_here are inlined into every access; shared_async.cpp calls the
// versions without `_here`.
[[gnu::always_inline]] inline void SharedMemory::mark_read_here(const Units& units, int thread,
                                                                uint16_t step) {
  Reads& reads = reads_[warp_of(thread)];
  const int32_t now = clocks_.now(thread);
  const uint32_t lane = lane_bit(thread);
  int32_t* read_clock = reads.clock.data() + units.first;
  uint32_t* read_lanes = reads.lanes.data() + units.first;
  uint16_t* read_step = reads.step.data() + units.first;
  int32_t* last_read = read_clock_.data() + units.first;
  for (int i = 0; i < units.count; ++i) {
    read_lanes[i] = (read_clock[i] == now ? read_lanes[i] : 0) | lane;
    read_clock[i] = now;
    read_step[i] = step;
    last_read[i] = last_read[i] > now ? last_read[i] : now;
  }
}

bool SharedMemory::read(const void* address, int bytes, int thread, const Step& step) {
  Units units;
  if (!find("a read", address, bytes, units)) return false;
  const WarpClock& clock = clocks_.of_warp(warp_of(thread));
  const int32_t* written = write_clock_.data() + units.first;
  // Fast path: most reads follow a barrier of the whole block.
  int doubtful = 0;
  for (int i = 0; i < units.count; ++i) {
    doubtful |= static_cast<int>(written[i] <= base_) | static_cast<int>(written[i] > clock.floor);
  }
  if (doubtful != 0 && !all_written_before(units, thread)) {
    for (int unit = units.first; unit < units.first + units.count; ++unit) {
      if (!check_unit_to_read(unit, thread)) return false;
    }
  }
  if (check_races) mark_read_here(units, thread, number_of(step));
  return true;
}

void SharedMemory::mark_read(const Units& units, int thread, uint16_t step) {
  mark_read_here(units, thread, step);
}

[[gnu::always_inline]] inline void SharedMemory::mark_written_here(const Units& units,
                                                                   int32_t clock, int thread,
                                                                   uint16_t step) {
  std::fill_n(write_clock_.begin() + units.first, units.count, clock);
  std::fill_n(writer_.begin() + units.first, units.count, static_cast<int16_t>(thread));
  std::fill_n(write_step_.begin() + units.first, units.count, step);
  if (async_) {
    const auto fences = static_cast<int32_t>(fences_[thread].size());
    std::fill_n(fences_at_write_.begin() + units.first, units.count, fences);
  }
}

// Whether `thread` may write to all units now.
[[gnu::always_inline]] inline bool SharedMemory::check_write_here(const Units& units, int thread) {
  const WarpClock& clock = clocks_.of_warp(warp_of(thread));
  const int32_t* written = write_clock_.data() + units.first;
  const int32_t* last_read = read_clock_.data() + units.first;
  int doubtful = 0;
  for (int i = 0; i < units.count; ++i) {
    doubtful |= static_cast<int>(written[i] > clock.floor);
    doubtful |= static_cast<int>(last_read[i] > clock.floor);
  }
  if (doubtful == 0) return true;
  if (!all_written_before(units, thread)) {
    for (int unit = units.first; unit < units.first + units.count; ++unit) {
      if (!check_unit_to_write(unit, thread)) return false;
    }
  }
  for (int warp = 0; check_races && warp < block_warps_; ++warp) {
    if (!check_reads_before_write(units, warp, thread)) return false;
  }
  return !async_ || check_tensor_reads(units, thread);
}

bool SharedMemory::write(const void* address, int bytes, int thread, const Step& step) {
  Units units;
  if (!find("a write", address, bytes, units)) return false;
  if (async_ && !check_not_held(units)) return false;
  if (!check_write_here(units, thread)) return false;
  mark_written_here(units, clocks_.now(thread), thread, number_of(step));
  return true;
}

bool SharedMemory::check_write(const Units& units, int thread) {
  return check_write_here(units, thread);
}

void SharedMemory::mark_written(const Units& units, int32_t clock, int thread, uint16_t step) {
  mark_written_here(units, clock, thread, step);
}

bool SharedMemory::start_copy(const Copy& copy, int thread) {
  // The copy may write from now on.
  if (!write(copy.shared, copy.bytes, thread, copy.step)) return false;
  Units units;
  find("a copy", copy.shared, copy.bytes, units);
  std::fill_n(write_clock_.begin() + units.first, units.count, kCopying);
  memset(copy.shared, 0xff, copy.bytes);
  return true;
}

void SharedMemory::finish_copy(const Copy& copy, int thread) {
  Units units;
  find("a copy", copy.shared, copy.bytes, units);
  mark_written(units, clocks_.now(thread), thread, number_of(copy.step));
  memcpy(copy.shared, copy.data, copy.bytes);
}

}  // namespace emulator
