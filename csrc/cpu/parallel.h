// Runs jobs on an Executor's threads; each thread has its own scratch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/backend.h"

namespace sink_attention::cpu {

// Uninitialised memory, aligned for any vector.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes) {
    if (bytes <= 0) return;
    memory_ = std::aligned_alloc(
        kAlignment, (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment);
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept : memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~AlignedBuffer() { std::free(memory_); }
  char* data() const { return static_cast<char*>(memory_); }

 private:
  static constexpr size_t kAlignment = 64;
  void* memory_ = nullptr;
};

enum class Use { kScratch, kPacked };

// Memory of one call that the calling thread keeps for its next call, up to kMaxKeptBytes for each
// use. Memory that is freed may go back to the system: allocating it again costs a page fault for
// every 4 KiB, which was a fifth of the time of a short call.
template <Use>
class KeptBuffer {
 public:
  explicit KeptBuffer(int64_t bytes) : is_kept_(bytes <= kMaxKeptBytes && !kept().in_use) {
    if (!is_kept_) {
      own_ = AlignedBuffer(bytes);
      data_ = own_.data();
      return;
    }
    Kept& mine = kept();
    if (mine.bytes < bytes) {
      mine.bytes = 0;
      mine.buffer = AlignedBuffer(0);
      mine.buffer = AlignedBuffer(bytes);
      mine.bytes = bytes;
    }
    mine.in_use = true;
    data_ = mine.buffer.data();
  }
  KeptBuffer(const KeptBuffer&) = delete;
  KeptBuffer& operator=(const KeptBuffer&) = delete;
  ~KeptBuffer() {
    if (is_kept_) kept().in_use = false;
  }
  char* data() const { return data_; }  // on any thread

 private:
  static constexpr int64_t kMaxKeptBytes = int64_t{4} << 20;
  struct Kept {
    AlignedBuffer buffer{0};
    int64_t bytes = 0;
    bool in_use = false;
  };
  static Kept& kept() {
    static thread_local Kept mine;
    return mine;
  }
  AlignedBuffer own_{0};
  char* data_;
  bool is_kept_;
};

// Calls body(job, scratch) for every job in [0, num_jobs). Free threads take jobs in order. scratch
// is the thread's own, of scratch_bytes, and allocated before the first job.
template <class Body>
void parallel_jobs(const Executor& executor, int64_t num_jobs, int64_t scratch_bytes,
                   const Body& body) {
  if (num_jobs <= 0) return;
  const int workers =
      static_cast<int>(std::min<int64_t>(std::max(executor.num_threads, 1), num_jobs));
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const KeptBuffer<Use::kScratch> scratch(workers * stride);
  struct Shared {
    const Body& body;
    int64_t num_jobs;
    int64_t stride;
    char* scratch;
    std::atomic<int64_t> next;
  } shared{body, num_jobs, stride, scratch.data(), {0}};
  const auto worker = [](void* argument, int worker_idx) {
    Shared& jobs = *static_cast<Shared*>(argument);
    char* mine = jobs.scratch + worker_idx * jobs.stride;
    for (int64_t job = jobs.next.fetch_add(1); job < jobs.num_jobs; job = jobs.next.fetch_add(1)) {
      jobs.body(job, mine);
    }
  };
  if (workers == 1) return worker(&shared, 0);
  executor.run(executor.context, workers, worker, &shared);
}

}  // namespace sink_attention::cpu
