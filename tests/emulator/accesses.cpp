// A running thread's accesses of memory: the checks of global and shared memory, and cp.async.
#include <cstring>

#include "emulator/machine.h"

namespace emulator {

void check_global(const void* address, int bytes, Access access, const Step& step) {
  if (is_accessible(address, bytes, access)) return;
  fault(step, why_not_accessible(address, bytes, access));
}

void read_shared(const void* address, int bytes, const Step& step) {
  SharedMemory& shared = current().block->shared;
  if (!shared.read(address, bytes, current().thread_idx, step)) fault(step, shared.error());
}

void write_shared(const void* address, int bytes, const Step& step) {
  SharedMemory& shared = current().block->shared;
  if (!shared.write(address, bytes, current().thread_idx, step)) fault(step, shared.error());
}

void begin_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step) {
  SharedMemory& memory = current().block->shared;
  if (!memory.begin_async_read(shared, bytes, reader, current().thread_idx, step)) {
    fault(step, memory.error());
  }
}

void end_async_read(const void* shared, int bytes, AsyncReader reader, const Step& step) {
  current().block->shared.end_async_read(shared, bytes, reader, current().thread_idx, step);
}

void fence_async_proxy() { current().block->shared.fence_async_proxy(current().thread_idx); }

void start_copy(void* shared, const void* global, int bytes, bool valid, const Step& step) {
  Copy copy{static_cast<char*>(shared), bytes, step, {}};
  if (valid) {
    check_global(global, bytes, Access::kRead, step);
    memcpy(copy.data, global, bytes);
  }
  SharedMemory& memory = current().block->shared;
  if (!memory.start_copy(copy, current().thread_idx)) fault(step, memory.error());
  current().copies.copies.push_back(copy);
  ++current().copies.open;
}

void commit_copies() {
  CopyQueue& queue = current().copies;
  queue.groups.push_back(queue.open);
  queue.open = 0;
}

void wait_for_copies(int pending) {
  CopyQueue& queue = current().copies;
  const int groups = static_cast<int>(queue.groups.size()) - pending;
  int finished = 0;
  for (int i = 0; i < groups; ++i) finished += queue.groups[i];
  for (int i = 0; i < finished; ++i) {
    current().block->shared.finish_copy(queue.copies[i], current().thread_idx);
  }
  if (groups <= 0) return;
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + finished);
  queue.groups.erase(queue.groups.begin(), queue.groups.begin() + groups);
}

}  // namespace emulator
