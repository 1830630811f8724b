// The copy engine: asynchronous copies between global and shared memory.
//
// The scheduler completes a copy at a random time, at the latest when nothing else can run. The
// copy reads its source then.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/step.h"
#include "emulator/tensor_map.h"

namespace emulator {

struct Block;
struct Thread;

struct AsyncCopy {
  enum class Kind { kBox, kBytes, kAdd };
  Kind kind;
  Step step;
  char* shared;
  char* global;
  int bytes;
  int mbarrier = -1;
  TensorMapData map{};
  int at[kMaxRank] = {};
  // kAdd: whether the sum is done, and whether it still holds its shared memory. If not, its floats
  // are in `taken`.
  bool done = false;
  bool held = false;
  std::vector<float> taken{};
};

struct CopyEngine {
  std::vector<std::shared_ptr<AsyncCopy>> under_way;
};

// A thread's bulk_reduce_adds that it has not waited for.
struct BulkQueue {
  using Group = std::vector<std::shared_ptr<AsyncCopy>>;
  Group open;
  std::vector<Group> groups;  // oldest first
  // Whether semaphore_wait was not yet followed by fence_proxy_async_global.
  bool semaphore_is_unfenced = false;
};

// ---- from a running thread ----

void start_tma_load(void* shared, const uint64_t (&map)[16], void* barrier, int rank, const int* at,
                    const Step& step);
void start_bulk_load(void* shared, const void* global, int bytes, void* barrier, const Step& step);
void start_bulk_add(float* global, const float* shared, int bytes, const Step& step);
void commit_bulk();
void wait_for_bulk_reads(int pending);
void wait_for_bulk(int pending);
void mark_acquired();
void fence_semaphore();
// Faults if the thread releases a semaphore (`step`) before bulk_wait has waited for all its sums.
void check_bulk_sums_complete(const Step& step);
// Faults if nobody has waited for a copy of this thread, or, if it is the block's last thread, of
// the block.
void check_end_of_copies(bool last_of_block);

// ---- from the scheduler ----

void end_copy(Block& block, size_t which);

}  // namespace emulator
