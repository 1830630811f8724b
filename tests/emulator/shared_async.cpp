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
  const size_t units = static_cast<size_t>(limit_) / kUnitBytes + 1;
  held_.assign(units, 0);
  held_step_.resize(units);
  fences_at_write_.assign(units, 0);
  fences_.assign(static_cast<size_t>(block_warps_) * 32, {});
  known_writes_.assign(kKnownWrites, {});
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

// Whether the writer's fence_proxy_async is ordered between its write of the unit and `thread` now.
bool SharedMemory::check_fenced(int unit, int thread) {
  const int writer = writer_[unit];
  if (writer >= kMaxThreads) return true;  // through the async proxy itself
  const std::vector<int32_t>& fences = fences_[writer];
  const auto first = static_cast<size_t>(fences_at_write_[unit]);
  if (first < fences.size() && (!check_races || clocks_.ordered(writer, fences[first], thread))) {
    return true;
  }
  return refuse(byte_name(unit) + " was written by " + writer_of(unit) +
                ", and no fence_proxy_async of that thread comes in between");
}

// Whether the tensor cores' reads are ordered before a write of `thread` now.
bool SharedMemory::check_tensor_reads(const Units& units, int thread) {
  for (int warpgroup = 0; check_races && warpgroup < kMaxWarps / kWarpgroupWarps; ++warpgroup) {
    const TensorReads& reads = tensor_reads_[warpgroup];
    if (reads.clock.empty()) continue;
    for (int unit = units.first; unit < units.first + units.count; ++unit) {
      if (reads.clock[unit] <= base_) continue;
      if (unit > units.first && reads.clock[unit] == reads.clock[unit - 1]) continue;
      if (clocks_.ordered(tensor_cores(warpgroup), reads.clock[unit], thread)) continue;
      return refuse("a race: " + byte_name(unit) + " was read by warpgroup " +
                    std::to_string(warpgroup) + " in " + describe(reads.step[unit]) +
                    ", and no barrier comes before this write");
    }
  }
  return true;
}

bool SharedMemory::begin_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                                    const Step& step) {
  use_async_proxy();
  Units units;
  if (!find_chunks("a read", address, bytes, units)) return false;
  const bool all = reader == AsyncReader::kWarpgroup;
  const int first_lane =
      all ? thread / kWarpgroupThreads * kWarpgroupThreads + thread % 32 : thread;
  for (int unit = units.first; unit < units.first + units.count; unit += kChunkUnits) {
    const bool alike = written_alike(unit);
    if (alike && is_known(unit, first_lane, all)) continue;
    for (int i = 0; i < (alike ? 1 : kChunkUnits); ++i) {
      for (int warp = 0; warp < (all ? kWarpgroupWarps : 1); ++warp) {
        const int lane = first_lane + 32 * warp;
        if (!check_unit_to_read(unit + i, lane) || !check_fenced(unit + i, lane)) return false;
      }
    }
    if (alike) known_writes_[known_at(unit)] = write_known_by(unit, first_lane, all);
  }
  uint16_t* held = held_.data() + units.first;
  for (int i = 0; i < units.count; ++i) ++held[i];
  std::fill_n(held_step_.begin() + units.first, units.count, number_of(step));
  return true;
}

// Whether the 16 bytes from this unit on come from one write.
bool SharedMemory::written_alike(int unit) const {
  const int32_t* clock = write_clock_.data() + unit;
  const int32_t* fences = fences_at_write_.data() + unit;
  const int16_t* writer = writer_.data() + unit;
  int32_t different = 0;
  for (int i = 1; i < kChunkUnits; ++i) {
    different |= (clock[i] ^ clock[0]) | (fences[i] ^ fences[0]) | (writer[i] ^ writer[0]);
  }
  return different == 0;
}

// A write that is ordered before a reader once stays so: a thread's knowledge only grows.
SharedMemory::KnownWrite SharedMemory::write_known_by(int unit, int reader, bool all) const {
  return {write_clock_[unit], fences_at_write_[unit], writer_[unit],
          static_cast<int16_t>(all ? reader : ~reader)};
}
size_t SharedMemory::known_at(int unit) const {
  return (static_cast<size_t>(write_clock_[unit]) * 7 + static_cast<size_t>(writer_[unit])) %
         kKnownWrites;
}
bool SharedMemory::is_known(int unit, int reader, bool all) const {
  const KnownWrite& known = known_writes_[known_at(unit)];
  const KnownWrite mine = write_known_by(unit, reader, all);
  return known.clock == mine.clock && known.fences == mine.fences && known.writer == mine.writer &&
         known.reader == mine.reader;
}

void SharedMemory::end_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                                  const Step& step) {
  Units units;
  if (!find_chunks("a read", address, bytes, units)) return;
  uint16_t* held = held_.data() + units.first;
  for (int i = 0; i < units.count; ++i) --held[i];
  if (!check_races) return;
  if (reader == AsyncReader::kThread) return mark_read(units, thread, number_of(step));
  const int warpgroup = thread / kWarpgroupThreads;
  TensorReads& reads = tensor_reads_[warpgroup];
  reads.clock.resize(write_clock_.size());
  reads.step.resize(write_clock_.size());
  std::fill_n(reads.clock.begin() + units.first, units.count, clocks_.tensor_clock(warpgroup));
  std::fill_n(reads.step.begin() + units.first, units.count, number_of(step));
  std::fill_n(read_clock_.begin() + units.first, units.count, kCopyClock);  // never below the floor
}

void SharedMemory::fence_async_proxy(int thread) {
  use_async_proxy();
  fences_[thread].push_back(clocks_.now(thread));
}

bool SharedMemory::begin_async_write(void* address, int bytes, int thread, const Step& step) {
  use_async_proxy();
  Units units;
  if (!find_chunks("a copy", address, bytes, units)) return false;
  if (!check_not_held(units) || !check_write(units, thread)) return false;
  for (int unit = units.first; unit < units.first + units.count; ++unit) {
    if (write_clock_[unit] > base_ && !check_fenced(unit, thread)) return false;
  }
  mark_written(units, kCopying, thread, number_of(step));
  std::fill_n(static_cast<char*>(address), bytes, '\xff');
  return true;
}

void SharedMemory::end_async_write(void* address, int bytes, Actor actor, int32_t clock) {
  Units units;
  if (!find_chunks("a copy", address, bytes, units)) return;
  std::fill_n(write_clock_.begin() + units.first, units.count, clock);
  std::fill_n(writer_.begin() + units.first, units.count, static_cast<int16_t>(actor));
}

bool SharedMemory::begin_mbarrier(void* address, int thread, const Step& step) {
  use_async_proxy();
  if (!write(address, 8, thread, step)) return false;
  std::fill_n(write_clock_.begin() + offset_of(address) / kUnitBytes, 8 / kUnitBytes, kBarrier);
  return true;
}

}  // namespace emulator
