#include "emulator/async_copy.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "emulator/machine.h"

namespace emulator {
namespace {

void check_range(const void* global, int64_t bytes, Access access, const Step& step) {
  if (is_accessible(global, bytes, access, 1)) return;
  fault(step, why_not_accessible(global, bytes, access, 1));
}

void check_multiple_of_16(const char* what, int64_t value, const Step& step) {
  if (value % 16 == 0) return;
  fault(step, std::string(what) + " is not a multiple of 16: " + std::to_string(value));
}

void start_load(AsyncCopy copy, void* barrier) {
  Block& block = *current().block;
  copy.mbarrier = mbarrier_for_copy(barrier, copy.step);
  if (!block.shared.begin_async_write(copy.shared, copy.bytes, current().thread_idx, copy.step)) {
    fault(copy.step, block.shared.error());
  }
  block.copies.under_way.push_back(std::make_shared<AsyncCopy>(std::move(copy)));
}

void add(AsyncCopy& copy) {
  auto* sums = reinterpret_cast<float*>(copy.global);
  const auto* values = copy.held ? reinterpret_cast<const float*>(copy.shared) : copy.taken.data();
  for (int i = 0; i < copy.bytes / static_cast<int>(sizeof(float)); ++i) sums[i] += values[i];
  copy.done = true;
}

// The copy has read shared memory: its bytes may be written again.
void let_go(AsyncCopy& copy) {
  if (!copy.held) return;
  const auto* values = reinterpret_cast<const float*>(copy.shared);
  if (!copy.done) copy.taken.assign(values, values + copy.bytes / sizeof(float));
  copy.held = false;
  end_async_read(copy.shared, copy.bytes, AsyncReader::kThread, copy.step);
}

}  // namespace

void start_tma_load(void* shared, const uint64_t (&map)[16], void* barrier, int rank, const int* at,
                    const Step& step) {
  AsyncCopy copy{AsyncCopy::Kind::kBox, step, static_cast<char*>(shared), nullptr, 0};
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    fault(step, "a tensor map that is not aligned to 64 bytes");
  }
  if (!decode(map, copy.map)) fault(step, "no tensor map of encode_tensor_map");
  if (copy.map.rank != rank) {
    fault(step, "a tensor map of rank " + std::to_string(copy.map.rank) + " loaded as rank " +
                    std::to_string(rank));
  }
  std::copy_n(at, rank, copy.at);
  copy.bytes = copy.map.box_bytes();
  const int offset = current().block->shared.offset_of(shared);
  if (offset % copy.map.alignment() != 0) {
    fault(step, "a box at shared byte " + std::to_string(offset) + ", which is not aligned to " +
                    std::to_string(copy.map.alignment()) + " bytes");
  }
  for (int row = 0; row < copy.map.num_rows(); ++row) {
    const RowPart part = row_part(copy.map, copy.at, row);
    if (part.bytes > 0) check_range(part.global, part.bytes, Access::kRead, step);
  }
  start_load(std::move(copy), barrier);
}

void start_bulk_load(void* shared, const void* global, int bytes, void* barrier, const Step& step) {
  check_multiple_of_16("the number of bytes", bytes, step);
  check_multiple_of_16("the global address",
                       static_cast<int64_t>(reinterpret_cast<uintptr_t>(global)), step);
  if (bytes <= 0) fault(step, "a copy of " + std::to_string(bytes) + " bytes");
  check_range(global, bytes, Access::kRead, step);
  start_load({AsyncCopy::Kind::kBytes, step, static_cast<char*>(shared),
              static_cast<char*>(const_cast<void*>(global)), bytes},
             barrier);
}

void start_bulk_add(float* global, const float* shared, int bytes, const Step& step) {
  check_multiple_of_16("the number of bytes", bytes, step);
  check_multiple_of_16("the global address",
                       static_cast<int64_t>(reinterpret_cast<uintptr_t>(global)), step);
  if (bytes <= 0) fault(step, "a copy of " + std::to_string(bytes) + " bytes");
  check_range(global, bytes, Access::kWrite, step);
  if (current().bulk.semaphore_is_unfenced)
    fault(step, "no fence_proxy_async_global since semaphore_wait");
  begin_async_read(shared, bytes, AsyncReader::kThread, step);
  auto copy = std::make_shared<AsyncCopy>(AsyncCopy{
      AsyncCopy::Kind::kAdd, step, const_cast<char*>(reinterpret_cast<const char*>(shared)),
      reinterpret_cast<char*>(global), bytes});
  copy->held = true;
  current().bulk.open.push_back(copy);
  current().block->copies.under_way.push_back(std::move(copy));
}

void commit_bulk() {
  BulkQueue& queue = current().bulk;
  queue.groups.push_back(std::exchange(queue.open, {}));
}

void wait_for_bulk_reads(int pending) {
  const BulkQueue& queue = current().bulk;
  for (size_t i = 0; i + pending < queue.groups.size(); ++i) {
    for (const auto& copy : queue.groups[i]) let_go(*copy);
  }
}

void wait_for_bulk(int pending) {
  wait_for_bulk_reads(pending);
  BulkQueue& queue = current().bulk;
  std::vector<std::shared_ptr<AsyncCopy>>& under_way = current().block->copies.under_way;
  while (queue.groups.size() > static_cast<size_t>(pending)) {
    for (const auto& copy : queue.groups.front()) {
      if (copy->done) continue;
      add(*copy);
      under_way.erase(std::find(under_way.begin(), under_way.end(), copy));
    }
    queue.groups.erase(queue.groups.begin());
  }
}

void mark_acquired() { current().bulk.semaphore_is_unfenced = true; }
void fence_semaphore() { current().bulk.semaphore_is_unfenced = false; }

void check_bulk_sums_complete(const Step& step) {
  const BulkQueue& queue = current().bulk;
  const auto refuse = [&](const BulkQueue::Group& group) {
    if (group.empty()) return;
    fault(step, "before bulk_wait waited for the sum of " + describe(group.front()->step));
  };
  for (const BulkQueue::Group& group : queue.groups) refuse(group);
  refuse(queue.open);
}

void check_end_of_copies(bool last_of_block) {
  const Thread& thread = current();
  for (const BulkQueue::Group& group : thread.bulk.groups) {
    if (group.empty()) continue;
    fault(group.front()->step, "the thread ended before bulk_wait waited for this");
  }
  if (!thread.bulk.open.empty()) {
    fault(thread.bulk.open.front()->step, "the thread ended before bulk_commit");
  }
  if (!last_of_block) return;
  const char* why = "the block ended, and nobody had waited for this copy";
  for (const auto& copy : thread.block->copies.under_way) fault(copy->step, why);
  for (const MbarrierState& state : thread.block->mbarriers.states) {
    if (state.copy_phase >= state.observed_phases) fault(state.copy, why);
  }
}

void end_copy(Block& block, size_t which) {
  std::vector<std::shared_ptr<AsyncCopy>>& under_way = block.copies.under_way;
  const std::shared_ptr<AsyncCopy> copy = std::move(under_way[which]);
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
  if (copy->kind == AsyncCopy::Kind::kAdd) return add(*copy);
  if (copy->kind == AsyncCopy::Kind::kBox) {
    load_box(copy->map, copy->at, copy->shared);
  } else {
    memcpy(copy->shared, copy->global, copy->bytes);
  }
  block.shared.end_async_write(copy->shared, copy->bytes, copies_of(copy->mbarrier),
                               copy_clock(block, copy->mbarrier));
  end_copy_at_mbarrier(block, copy->mbarrier, copy->bytes, copy->step);
}

}  // namespace emulator
