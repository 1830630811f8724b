// Injected faults in the use of shared memory. Each must be found in any order of threads, and the
// message must name its sites.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

int* word(char* shared, int i) { return reinterpret_cast<int*>(shared) + i; }

void missing_barriers() {
  expect_no_fault("both barriers are there", [] {
    run_block(64, 128, [](char* shared) {
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1);
      sync_threads();
      if (warp_idx() == 1) load_shared(word(shared, lane_idx()));
      sync_threads();
      if (warp_idx() == 0) store_shared(word(shared, 31 - lane_idx()), 2);
    });
  });
  // Which of the two comes first depends on the seed: the reader finds the writer, or no value.
  expect_fault("no barrier between write and read", {"load_shared at read:1: a "}, [] {
    run_block(64, 128, [](char* shared) {
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1, at("write"));
      if (warp_idx() == 1) load_shared(word(shared, lane_idx()), at("read"));
    });
  });
  expect_fault("no barrier between write and a neighbour's read",
               {"load_shared at read:1: a race: shared byte", "was written by thread",
                "in store_shared at write:1, and no barrier comes before this read"},
               [] {
                 run_warp([](char* shared) {
                   store_shared(word(shared, lane_idx()), 1, at("write"));
                   shfl_xor(1, 1);  // the lanes meet; that orders no memory
                   load_shared(word(shared, lane_idx() ^ 1), at("read"));
                 });
               });
  expect_fault("no barrier between read and overwrite",
               {"a race: shared byte", "at read:1", "at overwrite:1"}, [] {
                 run_block(64, 128, [](char* shared) {
                   if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1, at("write"));
                   sync_threads();
                   if (warp_idx() == 1) load_shared(word(shared, lane_idx()), at("read"));
                   if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 2, at("overwrite"));
                 });
               });
  expect_fault("read, then overwritten by a neighbour",
               {"store_shared at overwrite:1: a race: shared byte", "was read by thread",
                "in load_shared at read:1, and no barrier comes before this write"},
               [] {
                 run_warp([](char* shared) {
                   store_shared(word(shared, lane_idx()), 1);
                   sync_warp();
                   load_shared(word(shared, lane_idx()), at("read"));
                   any(true);
                   store_shared(word(shared, lane_idx() ^ 1), 2, at("overwrite"));
                 });
               });
  expect_fault("two threads write one word",
               {"store_shared at write:1: a race", "was written by thread",
                "and no barrier comes before this write"},
               [] {
                 run_block(64, 128, [](char* shared) {
                   store_shared(word(shared, thread_idx() / 2), 1, at("write"));
                 });
               });
  // Which of the two is second, and so at fault, depends on the order; both places are named.
  expect_fault("a barrier of other warps", {"a race: shared byte", "at write:1", "at read:1"}, [] {
    run_block(128, 128, [](char* shared) {
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1);
      sync_threads();
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 2, at("write"));
      sync_named(1 + warp_idx() / 2, 64);
      if (warp_idx() == 2) load_shared(word(shared, lane_idx()), at("read"));
    });
  });
  expect_no_fault("order that is handed on from barrier to barrier", [] {
    run_block(96, 128, [](char* shared) {
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1);
      if (warp_idx() < 2) sync_named(1, 64);
      if (warp_idx() > 0) sync_named(2, 64);
      if (warp_idx() == 2) load_shared(word(shared, lane_idx()));
    });
  });
}

void ldmatrix_without_barrier() {
  expect_fault("ldmatrix of rows that other lanes wrote",
               {"ldmatrix_x4 at product:1: a race", "in store_shared at fill:1"}, [] {
                 run_warp([](char* shared) {
                   store_shared(reinterpret_cast<Bytes16*>(shared) + lane_idx(), Bytes16{},
                                at("fill"));
                   any(true);
                   uint32_t r[4];
                   ldmatrix_x4(r, shared + (lane_idx() ^ 4) * 16, at("product"));
                 });
               });
}

void copies() {
  DeviceArray<uint32_t> source("source", 1024, 3);
  const VisibleBuffers buffers({source.readable()});
  const auto copy = [&](char* shared, int chunk) {
    cp_async_16(shared + 16 * chunk, &source[4 * chunk], true, at("copy"));
    cp_async_commit();
  };
  expect_fault("a wait for too few groups",
               {"ldmatrix_x4 at product:1: a read of shared byte", "before the copy of thread",
                "in cp_async_16 at copy:1 was waited for"},
               [&] {
                 run_warp([&](char* shared) {
                   for (int stage = 0; stage < 2; ++stage) copy(shared, lane_idx() + 32 * stage);
                   cp_async_wait<1>();
                   sync_threads();
                   uint32_t r[4];
                   ldmatrix_x4(r, shared + 512 + 16 * lane_idx(), at("product"));
                 });
               });
  expect_fault("a wait before the commit", {"load_shared at read:1", "before the copy of thread"},
               [&] {
                 run_warp([&](char* shared) {
                   cp_async_16(shared + 16 * lane_idx(), &source[0], true, at("copy"));
                   cp_async_wait<0>();
                   load_shared(word(shared, 4 * lane_idx()), at("read"));
                 });
               });
  expect_fault("no barrier after the wait",
               {"load_shared at read:1: a race", "in cp_async_16 at copy:1"}, [&] {
                 run_warp([&](char* shared) {
                   copy(shared, lane_idx());
                   cp_async_wait<0>();
                   any(true);
                   load_shared(word(shared, 4 * (lane_idx() ^ 1)), at("read"));
                 });
               });
  expect_fault("a copy into what is still being read",
               {"cp_async_16 at copy:1: a race", "was read by thread", "in load_shared at read:1"},
               [&] {
                 run_warp([&](char* shared) {
                   store_shared(word(shared, 4 * lane_idx()), 1);
                   sync_warp();
                   load_shared(word(shared, 4 * (lane_idx() ^ 1)), at("read"));
                   any(true);
                   copy(shared, lane_idx());
                   cp_async_wait<0>();
                 });
               });
  expect_fault("a store into a copy under way",
               {"store_shared at write:1: a write to shared byte", "before the copy of thread",
                "in cp_async_16 at copy:1 was waited for"},
               [&] {
                 run_warp([&](char* shared) {
                   copy(shared, lane_idx());
                   store_shared(word(shared, 4 * lane_idx()), 1, at("write"));
                 });
               });
  expect_fault("a copy that nobody waits for",
               {"cp_async_16 at copy:1: the thread ended before it waited for this copy"},
               [&] { run_warp([&](char* shared) { copy(shared, lane_idx()); }); });
}

void bounds() {
  expect_fault("a read of what nobody wrote",
               {"load_shared at read:1: a read of shared byte 12, which nobody has written",
                "block (0, 0, 0), thread 3"},
               [] {
                 run_warp([](char* shared) {
                   if (lane_idx() != 3) store_shared(word(shared, lane_idx()), 1);
                   load_shared(word(shared, lane_idx()), at("read"));
                 });
               });
  expect_fault("what the block before wrote", {"load_shared at read:1: a read", "nobody"}, [] {
    emulator::run_grid({9, 1, 1}, 32, 128, [](char* shared) {
      if (block_idx().x < 8) store_shared(word(shared, lane_idx()), 1);
      load_shared(word(shared, lane_idx()), at("read"));
    });
  });
  for (const int offset : {-4, 128, 1 << 20}) {
    expect_fault("a read outside of shared memory",
                 {"load_shared at read:1: a read outside of shared memory: byte", "of 128"}, [=] {
                   run_block(32, 128, [=](char* shared) {
                     load_shared(reinterpret_cast<int*>(shared + offset), at("read"));
                   });
                 });
    expect_fault("a write outside of shared memory",
                 {"store_shared at write:1: a write outside of shared memory: byte", "of 128"},
                 [=] {
                   run_block(32, 128, [=](char* shared) {
                     store_shared(reinterpret_cast<int*>(shared + offset), 1, at("write"));
                   });
                 });
  }
  expect_fault("the end of a wide access outside of shared memory",
               {"outside of shared memory: byte 120 of 128"}, [] {
                 run_block(32, 128, [](char* shared) {
                   store_shared(reinterpret_cast<Bytes16*>(shared + 120), Bytes16{});
                 });
               });
  expect_fault("a misaligned access of shared memory",
               {"store_shared at write:1: a write of shared byte 6, which is not aligned to 4"},
               [] {
                 run_warp([](char* shared) {
                   store_shared(reinterpret_cast<int*>(shared + 6), 1, at("write"));
                 });
               });
  expect_fault("a misaligned row", {"ldmatrix_x4_trans at product:1", "not aligned to 16"}, [] {
    run_warp([](char* shared) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, shared + 16 * lane_idx() + 8, at("product"));
    });
  });
}

}  // namespace

SA_SUITE(emulated_shared_faults) {
  missing_barriers();
  ldmatrix_without_barrier();
  copies();
  bounds();
}

}  // namespace sink_attention::tests
