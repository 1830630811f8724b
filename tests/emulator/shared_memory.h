// A block's shared memory and what is known of each of its bytes.
//
// It starts as NaNs that nobody has written; reading such a byte is a fault. So is a read or write
// beside which another thread's access stands that no barrier orders, if one of the two writes.
// Order is kept as vector clocks (clocks.h).
//
// A cp.async copy writes when it is waited for. From its start until then its bytes are nobody's to
// touch.
//
// wgmma and the copy engine reach shared memory through the async proxy (shared_async.cpp). What a
// thread has written through the generic one is there for them once it has called
// fence_proxy_async; bytes that they are reading are nobody's to write.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

constexpr int kUnitBytes = 2;  // the grain of the bookkeeping

struct Copy {
  char* shared;
  int bytes;
  Step step;
  unsigned char data[16];
};
struct CopyQueue {
  std::vector<Copy> copies;  // oldest first
  int open = 0;              // started since the last commit
  std::vector<int> groups;   // sizes of the committed groups under way, oldest first
};

// For whom the async proxy reads: for one thread (bulk_reduce_add), or for the four warps of its
// warpgroup, all of whose lanes have come to the instruction (wgmma).
enum class AsyncReader { kThread, kWarpgroup };

class SharedMemory {
 public:
  void start(int bytes, int num_warps);  // for a new block: all bytes unwritten
  char* data() { return data_; }
  int size() const { return limit_; }
  // Each returns whether all is well; what is wrong is then error().
  bool read(const void* address, int bytes, int thread, const Step& step);
  bool write(const void* address, int bytes, int thread, const Step& step);
  bool start_copy(const Copy& copy, int thread);
  void finish_copy(const Copy& copy, int thread);
  const std::string& error() const { return error_; }

  // The async proxy. Addresses and bytes are multiples of 16. From begin to end of a read its bytes
  // are not to be written; as many reads of a byte may be under way as there are ends to come.
  bool begin_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                        const Step& step);
  void end_async_read(const void* address, int bytes, AsyncReader reader, int thread,
                      const Step& step);
  void fence_async_proxy(int thread);

  // An asynchronous write: from begin to end its bytes are nobody's. Then they are the copies' of
  // an mbarrier, at a clock that a thread must know to read them.
  bool begin_async_write(void* address, int bytes, int thread, const Step& step);
  void end_async_write(void* address, int bytes, Actor actor, int32_t clock);
  // Bytes that are no data from now on.
  bool begin_mbarrier(void* address, int thread, const Step& step);
  int64_t offset_of(const void* address) const { return static_cast<const char*>(address) - data_; }

  Clocks& clocks() { return clocks_; }
  bool check_races = true;

  // Clocks from this one on are of copies.
  static constexpr int32_t kCopyClock = 1 << 30;

 private:
  // Write clocks: where a copy is under way, and where there is an mbarrier.
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
  int32_t base_ = 0;  // clocks up to this one are of earlier blocks
  Clocks clocks_;
  std::string error_;
  // Of each unit: its last write, or the copy under way into it.
  std::vector<int32_t> write_clock_;
  std::vector<int16_t> writer_;  // a thread
  std::vector<uint16_t> write_step_;
  std::vector<int32_t> read_clock_;  // the last of all warps
  // Of each warp and unit, the last clock at which it read, which of its lanes did then, and where
  // the last of them did.
  struct Reads {
    std::vector<int32_t> clock;
    std::vector<uint32_t> lanes;
    std::vector<uint16_t> step;
  };
  Reads reads_[kMaxWarps];
  // Of the async proxy: only kept from its first use in a block on.
  bool async_ = false;
  std::vector<uint16_t> held_;            // of each unit, its reads under way
  std::vector<uint16_t> held_step_;       // and the latest of them
  std::vector<int32_t> fences_at_write_;  // how many fences its last writer had called before
  static constexpr int kChunkUnits = 16 / kUnitBytes;
  static constexpr size_t kKnownWrites = 1024;
  std::vector<KnownWrite> known_writes_;  // that come before a reader, some of them
  // Of each warpgroup and unit, the clock at which its tensor cores last read, and where.
  struct TensorReads {
    std::vector<int32_t> clock;
    std::vector<uint16_t> step;
  };
  TensorReads tensor_reads_[kMaxWarps / kWarpgroupWarps];
  std::vector<std::vector<int32_t>> fences_;  // of each thread, the clocks of its fences
};

}  // namespace emulator
