#include "emulator/shared_memory.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr int kAlignment = 1024;
int warp_of(int thread) { return thread / 32; }
std::string thread_name(int thread) { return "thread " + std::to_string(thread); }
std::string byte_name(int unit) { return "shared byte " + std::to_string(unit * kUnitBytes); }

}  // namespace

void SharedMemory::start(int bytes, int num_warps) {
  if (bytes > bytes_ || num_warps > num_warps_) {
    bytes_ = std::max(bytes, bytes_);
    num_warps_ = std::max(num_warps, num_warps_);
    memory_.assign(bytes_ + kAlignment, 0);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (kAlignment - address % kAlignment) % kAlignment;
    const int units = (bytes_ + kUnitBytes - 1) / kUnitBytes;
    write_clock_.assign(units, 0);
    writer_.assign(units, kNobody);
    for (int warp = 0; warp < num_warps_; ++warp) {
      read_clock_[warp].assign(units, 0);
      reader_[warp].assign(units, kNobody);
    }
    latest_ = 0;
  }
  limit_ = bytes;
  memset(data_, 0xff, bytes);
  copier_.assign((bytes_ + kUnitBytes - 1) / kUnitBytes, kNobody);
  base_ = latest_;
  latest_ = base_ + 1;
  WarpClock clock{};
  for (uint32_t& seen : clock.seen) seen = base_;
  clocks_.assign(num_warps_, clock);
  for (int warp = 0; warp < num_warps_; ++warp) clocks_[warp].seen[warp] = latest_;
}

std::string SharedMemory::find(const void* address, int bytes, int& first, int& count) const {
  const int64_t offset = static_cast<const char*>(address) - data_;
  if (offset < 0 || offset + bytes > limit_) {
    return "outside of shared memory: byte " + std::to_string(offset) + " of " +
           std::to_string(limit_);
  }
  if (offset % bytes != 0) {
    return "of shared byte " + std::to_string(offset) + ", which is not aligned to " +
           std::to_string(bytes) + " bytes";
  }
  first = static_cast<int>(offset) / kUnitBytes;
  count = std::max(bytes / kUnitBytes, 1);
  return "";
}

// Whether `earlier`'s access at `clock` comes before what `thread` does now.
bool SharedMemory::ordered(int earlier, uint32_t clock, int thread) const {
  if (earlier == thread) return true;
  const uint32_t seen = clocks_[warp_of(thread)].seen[warp_of(earlier)];
  return warp_of(earlier) == warp_of(thread) ? clock < seen : clock <= seen;
}

// Whether all reads of a unit come before; if not, one that does not.
bool SharedMemory::ordered_after_reads(int unit, int thread, int& reader) const {
  for (int warp = 0; warp < num_warps_; ++warp) {
    const uint32_t clock = read_clock_[warp][unit];
    if (clock <= base_) continue;
    reader = reader_[warp][unit];
    // Of several lanes at least one is not this thread.
    if (reader == kSeveral) reader = thread == warp * 32 ? thread + 1 : warp * 32;
    if (!ordered(reader, clock, thread)) return false;
  }
  return true;
}

std::string SharedMemory::why_not_readable(int unit, int thread) const {
  if (copier_[unit] != kNobody) {
    return "a read of " + byte_name(unit) + " before the cp_async of " +
           thread_name(copier_[unit]) + " was waited for";
  }
  if (write_clock_[unit] <= base_) {
    return "a read of " + byte_name(unit) + ", which nobody has written";
  }
  if (check_races && !ordered(writer_[unit], write_clock_[unit], thread)) {
    return "a race: " + byte_name(unit) + " was written by " + thread_name(writer_[unit]) +
           ", and no barrier comes before this read";
  }
  return "";
}

std::string SharedMemory::why_not_writable(int unit, int thread) const {
  if (copier_[unit] != kNobody) {
    return "a write to " + byte_name(unit) + " before the cp_async of " +
           thread_name(copier_[unit]) + " was waited for";
  }
  if (!check_races) return "";
  if (write_clock_[unit] > base_ && !ordered(writer_[unit], write_clock_[unit], thread)) {
    return "a race: " + byte_name(unit) + " was written by " + thread_name(writer_[unit]) +
           ", and no barrier comes before this write";
  }
  int reader = kNobody;
  if (!ordered_after_reads(unit, thread, reader)) {
    return "a race: " + byte_name(unit) + " was read by " + thread_name(reader) +
           ", and no barrier comes before this write";
  }
  return "";
}

std::string SharedMemory::read(const void* address, int bytes, int thread) {
  int first = 0;
  int count = 0;
  std::string wrong = find(address, bytes, first, count);
  if (!wrong.empty()) return "a read " + wrong;
  const int warp = warp_of(thread);
  const uint32_t now = clocks_[warp].seen[warp];
  uint32_t* read_clock = read_clock_[warp].data();
  int16_t* reader = reader_[warp].data();
  for (int unit = first; unit < first + count; ++unit) {
    if (copier_[unit] != kNobody || write_clock_[unit] <= base_ ||
        !ordered(writer_[unit], write_clock_[unit], thread)) {
      wrong = why_not_readable(unit, thread);
      if (!wrong.empty()) return wrong;
    }
    const bool shared = read_clock[unit] == now && reader[unit] != thread;
    reader[unit] = shared ? kSeveral : static_cast<int16_t>(thread);
    read_clock[unit] = now;
  }
  return "";
}

std::string SharedMemory::write(const void* address, int bytes, int thread) {
  int first = 0;
  int count = 0;
  std::string wrong = find(address, bytes, first, count);
  if (!wrong.empty()) return "a write " + wrong;
  const int warp = warp_of(thread);
  for (int unit = first; unit < first + count; ++unit) {
    wrong = why_not_writable(unit, thread);
    if (!wrong.empty()) return wrong;
    write_clock_[unit] = clocks_[warp].seen[warp];
    writer_[unit] = static_cast<int16_t>(thread);
  }
  return "";
}

std::string SharedMemory::start_copy(void* address, int bytes, int thread) {
  std::string wrong = write(address, bytes, thread);  // it may write from now on
  if (!wrong.empty()) return wrong;
  int first = 0;
  int count = 0;
  find(address, bytes, first, count);
  std::fill_n(copier_.begin() + first, count, static_cast<int16_t>(thread));
  memset(address, 0xff, bytes);
  return "";
}

void SharedMemory::finish_copy(const Copy& copy, int thread) {
  int first = 0;
  int count = 0;
  find(copy.shared, copy.bytes, first, count);
  const int warp = warp_of(thread);
  for (int unit = first; unit < first + count; ++unit) {
    copier_[unit] = kNobody;
    write_clock_[unit] = clocks_[warp].seen[warp];
    writer_[unit] = static_cast<int16_t>(thread);
  }
  memcpy(copy.shared, copy.data, copy.bytes);
}

void SharedMemory::order_lanes(int warp) {
  latest_ = std::max(latest_, ++clocks_[warp].seen[warp]);
}

void SharedMemory::order_warps(const std::vector<int>& warps) {
  WarpClock joined{};
  for (const int warp : warps) {
    for (int i = 0; i < num_warps_; ++i) {
      joined.seen[i] = std::max(joined.seen[i], clocks_[warp].seen[i]);
    }
  }
  for (const int warp : warps) clocks_[warp] = joined;
  for (const int warp : warps) order_lanes(warp);
}

}  // namespace emulator
