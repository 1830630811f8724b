// The copy engine: copies between global and shared memory that run beside all threads.
//
// A copy ends at a random moment of the scheduler's, at the latest when nothing else can run. What
// it reads it reads then.
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
  // Of kAdd: whether it has been done, and whether shared memory is still held for it. The floats
  // are taken from `taken` if it is not.
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
  // Whether its turn has come, but sums that it starts may still come before those it waited for.
  bool turn_is_unfenced = false;
};

// ---- from a running thread ----

void start_tma_load(void* shared, const uint64_t (&map)[16], void* barrier, int rank, const int* at,
                    const Step& step);
void start_bulk_load(void* shared, const void* global, int bytes, void* barrier, const Step& step);
void start_bulk_add(float* global, const float* shared, int bytes, const Step& step);
void commit_bulk();
void wait_for_bulk_reads(int pending);
void wait_for_bulk(int pending);
void mark_release();
void fence_turn();
// Faults if the thread tells other blocks that it is done (`step`) before bulk_wait has waited for
// all its sums.
void check_sums_are_made(const Step& step);
// Faults if copies are left that nobody has waited for: of this thread, or, as it is its block's
// last, of the block.
void check_end_of_copies(bool last_of_block);

// ---- from the scheduler ----

void end_copy(Block& block, size_t which);

}  // namespace emulator
