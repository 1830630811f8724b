// A block's shared memory, with bookkeeping for each of its units (2 bytes).
//
// Shared memory starts as NaN. Reading a byte that nobody wrote is a fault. A race is a fault, too:
// two accesses of different threads, at least one of them a write, that no barrier orders. Order is
// kept as vector clocks (clocks.h).
//
// A cp.async copy writes when it is waited for. From its start until then nobody may access its
// bytes.
//
// wgmma and the copy engine access shared memory through the async proxy (shared_async.cpp). They
// see what a thread wrote through the generic proxy only after that thread's fence_proxy_async.
// Nobody may write bytes that they are reading.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

constexpr int kUnitBytes = 2;  // the granularity of the bookkeeping

struct Copy {
  char* shared;
  int bytes;
  Step step;
  unsigned char data[16];
};
struct CopyQueue {
  std::vector<Copy> copies;  // oldest first
  int open = 0;              // started since the last commit
  std::vector<int> groups;   // sizes of the incomplete committed groups, oldest first
};

// The reader behind an async proxy read: one thread (bulk_reduce_add), or a warpgroup, all of whose
// lanes are at the instruction (wgmma).
enum class AsyncReader { kThread, kWarpgroup };

class SharedMemory {
 public:
  void start(int bytes, int num_warps);  // for a new block: all bytes unwritten
  char* data() { return data_; }
  int size() const { return limit_; }
  // Each returns whether the access is valid; if not, error() says why.
  bool read(const void* address, int bytes, int thread, const Step& step);
  bool write(const void* address, int bytes, int thread, const Step& step);
  bool start_copy(const Copy& copy, int thread);
  void finish_copy(const Copy& copy, int thread);
  const std::string& error() const { return error_; }

  // The async proxy. Addresses and bytes are multiples of 16. From begin to end of a read nobody
  // may write its bytes. Several reads of a byte may overlap.
  bool begin_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                        const Step& step);
  void end_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                      const Step& step);
  void fence_async_proxy(int thread);

  // An asynchronous write. From begin to end nobody may access its bytes. Then a thread may read
  // them if it knows the given clock of the actor: an mbarrier's copies.
  bool begin_async_write(void* address, int bytes, int thread, const Step& step);
  void end_async_write(void* address, int bytes, Actor actor, int32_t clock);
  // Marks 8 bytes as an mbarrier, which ordinary accesses may not touch.
  bool begin_mbarrier(void* address, int thread, const Step& step);
  int64_t offset_of(const void* address) const { return static_cast<const char*>(address) - data_; }

  Clocks& clocks() { return clocks_; }
  bool check_races = true;

  // Clocks from this one on belong to copies.
  static constexpr int32_t kCopyClock = 1 << 30;

 private:
  // Special write clocks: of bytes with an incomplete copy, and of an mbarrier's bytes.
  static constexpr int32_t kCopying = INT32_MAX;
  static constexpr int32_t kBarrier = INT32_MAX - 1;

  struct Units {
    int first = 0;
    int count = 0;
  };
  bool find(const char* access, const void* address, int bytes, Units& units);
  [[gnu::cold]] bool refuse_address(const char* access, int64_t offset, int bytes);
  bool all_written_before(const Units& units, int thread) const;
  [[gnu::cold]] bool check_unit_to_read(int unit, int thread);
  [[gnu::cold]] bool check_unit_to_write(int unit, int thread);
  bool check_write(const Units& units, int thread);
  bool check_write_here(const Units& units, int thread);
  bool check_reads_before_write(const Units& units, int warp, int thread);
  bool refuse(const std::string& why);
  std::string writer_of(int unit) const;
  void mark_written(const Units& units, int32_t clock, int thread, uint16_t step);
  void mark_written_here(const Units& units, int32_t clock, int thread, uint16_t step);
  void clear(int bytes, int num_warps);
  void use_async_proxy();
  bool find_chunks(const char* access, const void* address, int bytes, Units& units);
  bool check_fenced(int unit, int thread);
  bool check_not_held(const Units& units);
  bool check_tensor_reads(const Units& units, int thread);
  void mark_read(const Units& units, int thread, uint16_t step);
  void mark_read_here(const Units& units, int thread, uint16_t step);
  bool written_alike(int unit) const;
  struct KnownWrite {
    int32_t clock = -1;
    int32_t fences;
    int16_t writer;
    int16_t reader;
  };
  KnownWrite write_known_by(int unit, int reader, bool all) const;
  size_t known_at(int unit) const;
  bool is_known(int unit, int reader, bool all) const;

  std::vector<char> memory_;
  char* data_ = nullptr;
  int bytes_ = 0;      // of the largest block so far
  int limit_ = 0;      // of this block
  int num_warps_ = 0;  // likewise
  int block_warps_ = 0;
  int32_t base_ = 0;  // clocks up to this one belong to earlier blocks
  Clocks clocks_;
  std::string error_;
  // For each unit: its last write, or the incomplete copy into it.
  std::vector<int32_t> write_clock_;
  std::vector<int16_t> writer_;  // a thread
  std::vector<uint16_t> write_step_;
  std::vector<int32_t> read_clock_;  // the last of all warps
  // For each warp and unit: the last clock at which the warp read it, the lanes that read then, and
  // the step of the last of them.
  struct Reads {
    std::vector<int32_t> clock;
    std::vector<uint32_t> lanes;
    std::vector<uint16_t> step;
  };
  Reads reads_[kMaxWarps];
  // The async proxy's bookkeeping, kept from its first use in a block on.
  bool async_ = false;
  std::vector<uint16_t> held_;            // for each unit: its incomplete reads
  std::vector<uint16_t> held_step_;       // the step of the latest of them
  std::vector<int32_t> fences_at_write_;  // the number of its last writer's fences before the write
  static constexpr int kChunkUnits = 16 / kUnitBytes;
  static constexpr size_t kKnownWrites = 1024;
  std::vector<KnownWrite> known_writes_;  // a cache of writes that are ordered before a reader
  // For each warpgroup and unit: the clock and the step of its tensor cores' last read.
  struct TensorReads {
    std::vector<int32_t> clock;
    std::vector<uint16_t> step;
  };
  TensorReads tensor_reads_[kMaxWarps / kWarpgroupWarps];
  std::vector<std::vector<int32_t>> fences_;  // for each thread: the clocks of its fences
};

}  // namespace emulator
