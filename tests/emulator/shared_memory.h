// A block's shared memory and what is known of each of its bytes.
//
// It starts as NaNs that nobody has written; reading such a byte is a fault. So is a read or write
// beside which another thread's access stands that no barrier orders, if one of the two writes.
// Order is kept as vector clocks of warps: a warp's clock ticks when it passes a barrier, and a
// barrier tells each of its warps the others' clocks; lanes of one warp are ordered by sync_warp
// and barriers only.
//
// A cp.async copy writes when it is waited for. From its start until then its bytes are nobody's to
// touch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

constexpr int kMaxWarps = 16;
constexpr int kUnitBytes = 2;  // the grain of the bookkeeping

struct WarpClock {
  uint32_t
      seen[kMaxWarps];  // of each warp, its accesses up to this clock come before what I do now
};

struct Copy {
  char* shared;
  int bytes;
  unsigned char data[16];
};
struct CopyQueue {
  std::vector<Copy> copies;  // oldest first
  int open = 0;              // started since the last commit
  std::vector<int> groups;   // sizes of the committed groups under way, oldest first
};

class SharedMemory {
 public:
  void start(int bytes, int num_warps);  // for a new block: all bytes unwritten
  char* data() { return data_; }
  // Each returns what is wrong, or an empty string.
  std::string read(const void* address, int bytes, int thread);
  std::string write(const void* address, int bytes, int thread);
  std::string start_copy(void* address, int bytes, int thread);
  void finish_copy(const Copy& copy, int thread);

  void order_lanes(int warp);                       // sync_warp
  void order_warps(const std::vector<int>& warps);  // a barrier
  bool check_races = true;

 private:
  static constexpr int16_t kNobody = -1;
  static constexpr int16_t kSeveral = -2;
  bool ordered(int earlier, uint32_t clock, int thread) const;
  bool ordered_after_reads(int unit, int thread, int& reader) const;
  std::string find(const void* address, int bytes, int& first, int& count) const;
  std::string why_not_readable(int unit, int thread) const;
  std::string why_not_writable(int unit, int thread) const;

  std::vector<char> memory_;
  char* data_ = nullptr;
  int bytes_ = 0;  // of the largest block so far
  int limit_ = 0;  // of this block
  int num_warps_ = 0;
  uint32_t base_ = 0;  // clocks up to this one are of earlier blocks
  uint32_t latest_ = 0;
  std::vector<WarpClock> clocks_;
  // Of each unit: its last write, the copy under way into it, and each warp's last read.
  std::vector<uint32_t> write_clock_;
  std::vector<int16_t> writer_;  // a thread; meaningless where write_clock_ <= base_
  std::vector<int16_t> copier_;  // a thread or kNobody
  std::vector<uint32_t> read_clock_[kMaxWarps];
  std::vector<int16_t> reader_[kMaxWarps];  // the one thread that read at that clock, or kSeveral
};

}  // namespace emulator
