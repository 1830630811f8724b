// Shared memory as the async proxy sees it.
#include <algorithm>

#include "emulator/shared_memory.h"

namespace emulator {
namespace {

std::string byte_name(int unit) { return "shared byte " + std::to_string(unit * kUnitBytes); }

}  // namespace

void SharedMemory::use_async_proxy() {
  if (async_) return;
  async_ = true;
  held_.assign(write_clock_.size(), 0);
  held_step_.assign(write_clock_.size(), kUnknownStep);
  fences_at_write_.assign(write_clock_.size(), 0);
  fences_.assign(static_cast<size_t>(block_warps_) * 32, {});
}

bool SharedMemory::find_chunks(const char* access, const void* address, int bytes, Units& units) {
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) -
                                           reinterpret_cast<uintptr_t>(data_));
  if (offset < 0 || offset + bytes > limit_) return refuse_address(access, offset, bytes);
  if (offset % 16 != 0 || bytes % 16 != 0) return refuse_address(access, offset, 16);
  units.first = static_cast<int>(offset) / kUnitBytes;
  units.count = bytes / kUnitBytes;
  return true;
}

bool SharedMemory::check_not_held(const Units& units) {
  for (int unit = units.first; unit < units.first + units.count; ++unit) {
    if (held_[unit] == 0) continue;
    return refuse("a write to " + byte_name(unit) + ", which is being read by " +
                  describe(held_step_[unit]));
  }
  return true;
}

// Whether the writer's fence comes between its write of the unit and what `thread` does now.
bool SharedMemory::check_fenced(int unit, int thread) {
  const int writer = writer_[unit];
  const std::vector<int32_t>& fences = fences_[writer];
  const auto first = static_cast<size_t>(fences_at_write_[unit]);
  if (first < fences.size() && (!check_races || ordered(writer, fences[first], thread))) {
    return true;
  }
  return refuse(byte_name(unit) + " was written by " + writer_of(unit) +
                ", and no fence_proxy_async of that thread comes in between");
}

bool SharedMemory::begin_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                                    const Step& step) {
  use_async_proxy();
  Units units;
  if (!find_chunks("a read", address, bytes, units)) return false;
  const bool all = reader == AsyncReader::kWarpgroup;
  const int num_warps = all ? kWarpgroupWarps : 1;
  const int first = all ? thread % 32 + thread / 128 * 128 : thread;
  for (int warp = 0; warp < num_warps; ++warp) {
    const int lane = first + 32 * warp;
    for (int unit = units.first; unit < units.first + units.count; ++unit) {
      // Mostly all is as with the unit before.
      if (unit > units.first && write_clock_[unit] == write_clock_[unit - 1] &&
          writer_[unit] == writer_[unit - 1] &&
          fences_at_write_[unit] == fences_at_write_[unit - 1]) {
        continue;
      }
      if (!check_unit_to_read(unit, lane) || !check_fenced(unit, lane)) return false;
    }
  }
  const uint16_t place = number_of(step);
  for (int unit = units.first; unit < units.first + units.count; ++unit) {
    ++held_[unit];
    held_step_[unit] = place;
  }
  return true;
}

void SharedMemory::end_async_read(const void* address, int bytes, AsyncReader, int thread,
                                  const Step& step) {
  Units units;
  if (!find_chunks("a read", address, bytes, units)) return;
  for (int unit = units.first; unit < units.first + units.count; ++unit) --held_[unit];
  if (check_races) mark_read(units, thread, number_of(step));
}

void SharedMemory::fence_async_proxy(int thread) {
  use_async_proxy();
  fences_[thread].push_back(clocks_[thread / 32].seen[thread / 32]);
}

}  // namespace emulator
