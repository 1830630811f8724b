// Work in jobs over an Executor's threads, each thread with memory of its own.
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

// Calls body(job, scratch) for every job in [0, num_jobs), taken in order by whichever thread is
// free; scratch is scratch_bytes of the thread's own, allocated before any job starts.
template <class Body>
void parallel_jobs(const Executor& executor, int64_t num_jobs, int64_t scratch_bytes,
                   const Body& body) {
  if (num_jobs <= 0) return;
  const int workers =
      static_cast<int>(std::min<int64_t>(std::max(executor.num_threads, 1), num_jobs));
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const AlignedBuffer scratch(workers * stride);
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
