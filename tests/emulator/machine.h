// The emulated GPU: blocks of threads, one fiber a thread, that meet at barriers and warp-wide
// instructions.
//
// A fiber runs until it must wait for others. A warp-wide instruction is done once, by the lane
// that arrives last, for all 32; lanes that meet at different instructions are a fault, as is a
// barrier that some thread never reaches. The order of warps and lanes is drawn from a seed, so
// that a kernel that needs a barrier and has none computes something else sooner or later; the
// shared memory's own bookkeeping (shared_memory.h) sees most of those at once.
//
// A Fault says what happened, where, in which block and thread. run_grid throws it.
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
  int resident_blocks = 2;  // so many blocks run at once, in turns
  bool check_races = true;
  int64_t blocks_run = 0;                      // counted by run_grid
  std::map<std::string, int64_t> blocks_of;    // blocks run to their end, by the kernel's C++ name
  std::map<std::string, int64_t> launches_of;  // that ran to their end, likewise
};
Settings& settings();

// Runs body(shared memory) in each thread of each block. Blocks start in the order of their linear
// index.
void run_grid(Grid grid, int num_threads, int shared_bytes, const std::function<void(char*)>& body);

// ---- for the twins of primitives, called from a running thread ----

struct Block;
class Machine;

struct Thread {
  int thread_idx = 0;
  Block* block = nullptr;
  Context context;
  bool done = false;
  CopyQueue copies;  // its cp.async copies under way
  BulkQueue bulk;    // its bulk_reduce_adds
  // Waiting: at what (the step lies on the thread's own stack), and what for.
  const Step* step = nullptr;
  bool waiting = false;
  void* operands = nullptr;
  const int* turn = nullptr;
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
// The running thread gives up the processor until somebody wakes it.
void wait_here(const Step& step);
void wake(Thread& thread);

// One warp-wide instruction: all 32 lanes come here with the same step; `execute` is called once
// with the operands of lane 0 .. 31.
void collective(const Step& step, void* operands, void (*execute)(void* const* lanes));
// The same for a warpgroup: the 128 lanes of warps 4 w ... 4 w + 3.
void warpgroup_collective(const Step& step, void* operands, void (*execute)(void* const* lanes));
// What a warp-wide instruction that may have to wait for other warps begins with: true in the lane
// that comes last, while the others wait; in those, false once somebody has woken them.
bool gather_warp(const Step& step, void* operands);
WarpgroupProducts& warpgroup_products();
PackLog* pack_log();  // the running thread's, if there is one and it uses wgmma
// Orders the shared memory accesses of the warp's lanes; from within `execute`.
void warp_is_ordered();
// Until *turn == value, which another block brings about.
void wait_until_equal(const int* turn, int value, const Step& step);

// Accesses: bounds, alignment, and for shared memory unwritten bytes and races.
void check_global(const void* address, int bytes, Access access, const Step& step);
void read_shared(const void* address, int bytes, const Step& step);
void write_shared(const void* address, int bytes, const Step& step);
void start_copy(void* shared, const void* global, int bytes, bool valid, const Step& step);
// The async proxy reads (shared_memory.h) for the running thread or its warpgroup: faults at bytes
// out of bounds, not written, written without order or without the writer's fence_proxy_async.
// Until the end of the read, a write to its bytes is a fault; then it counts as a read by the
// reader now.
void begin_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step);
void end_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step);
void fence_async_proxy();
void commit_copies();
void wait_for_copies(int pending);

[[noreturn]] void fault(const Step& step, const std::string& what);

}  // namespace emulator
