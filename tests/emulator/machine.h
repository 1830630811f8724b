// The emulated GPU: thread blocks in which each thread is a fiber. Fibers wait for each other at
// barriers and at warp-wide instructions.
//
// A fiber runs until it must wait. A warp-wide instruction is executed once, by the last lane to
// arrive, for all 32. Lanes at different instructions are a fault, and so is a barrier that some
// thread never reaches. The order of warps and lanes is drawn from a seed, so a missing barrier
// changes the result with some seed. Most missing barriers are found at once, by the bookkeeping of
// shared memory (shared_memory.h).
//
// run_grid throws a Fault: what happened, where in the source, in which block and thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/async_copy.h"
#include "emulator/barriers.h"
#include "emulator/fiber.h"
#include "emulator/global_memory.h"
#include "emulator/mbarriers.h"
#include "emulator/poison.h"
#include "emulator/registers.h"
#include "emulator/shared_memory.h"
#include "emulator/step.h"
#include "emulator/wgmma_groups.h"

namespace emulator {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Grid {
  int x;
  int y;
  int z;
};

struct Settings {
  uint64_t seed = 1;
  int resident_blocks = 2;  // the number of blocks that run concurrently
  bool check_races = true;
  int64_t blocks_run = 0;                      // counted by run_grid
  std::map<std::string, int64_t> blocks_of;    // completed blocks by the kernel's C++ name
  std::map<std::string, int64_t> launches_of;  // completed launches, likewise
};
Settings& settings();

// Runs body(shared memory) in each thread of each block. Blocks start in the order of their linear
// index.
void run_grid(Grid grid, int num_threads, int shared_bytes, const std::function<void(char*)>& body);

// ---- for the emulation of primitives, called from a running thread ----

struct Block;
class Machine;

struct Thread {
  int thread_idx = 0;
  Block* block = nullptr;
  Context context;
  bool done = false;
  CopyQueue copies;  // its incomplete cp.async copies
  BulkQueue bulk;    // its bulk_reduce_adds
  // While it waits: the step (on the thread's own stack), and what it waits for.
  const Step* step = nullptr;
  bool waiting = false;
  void* operands = nullptr;
  const int* semaphore = nullptr;
  int awaited = 0;
  PackLog* packs = nullptr;  // once its warpgroup has used wgmma
};

struct Block {
  Grid index{};
  Machine* machine = nullptr;
  int thread_count = 0;
  SharedMemory shared;
  Barriers barriers;
  Mbarriers mbarriers;
  CopyEngine copies;
  Registers registers;
  Warpgroup warpgroups[kMaxWarps / kWarpgroupWarps];
  std::vector<Thread> threads;
  int num_threads() const { return thread_count; }
};

class Machine {
 public:
  virtual ~Machine() = default;
  virtual Grid grid() const = 0;
};

Thread& current();
// Suspends the running thread until another one wakes it.
void wait_here(const Step& step);
void wake(Thread& thread);

// A warp-wide instruction: all 32 lanes call with the same step. `execute` is called once, with the
// operands of lanes 0 .. 31.
void collective(const Step& step, void* operands, void (*execute)(void* const* lanes));
// The same for a warpgroup: the 128 lanes of warps 4 w ... 4 w + 3.
void warpgroup_collective(const Step& step, void* operands, void (*execute)(void* const* lanes));
// The start of a warp-wide instruction that may wait for other warps. Returns true in the last
// lane, while the others wait. Returns false in the others, once they are woken.
bool gather_warp(const Step& step, void* operands);
WarpgroupProducts& warpgroup_products();
PackLog* pack_log();  // the running thread's; null without one, or if it does not use wgmma
// Orders the shared memory accesses of the warp's lanes. Called from `execute`.
void warp_is_ordered();
// Waits until another block has set *semaphore to value.
void wait_until_equal(const int* semaphore, int value, const Step& step);

// Accesses. Checked: bounds and alignment; in shared memory also unwritten bytes and races.
void check_global(const void* address, int bytes, Access access, const Step& step);
void read_shared(const void* address, int bytes, const Step& step);
void write_shared(const void* address, int bytes, const Step& step);
void start_copy(void* shared, const void* global, int bytes, bool valid, const Step& step);
// A read by the async proxy (shared_memory.h), for the running thread or its warpgroup. A fault:
// bytes that are out of bounds, unwritten, written without a barrier in between, or without the
// writer's fence_proxy_async. Until end_async_read a write to the bytes is a fault. Then the read
// counts as an access of the reader at that time.
void begin_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step);
void end_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step);
void fence_async_proxy();
void commit_copies();
void wait_for_copies(int pending);

[[noreturn]] void fault(const Step& step, const std::string& what);

}  // namespace emulator
