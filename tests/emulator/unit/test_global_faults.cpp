// Injected faults in the use of global memory.
#include "emulated.h"

namespace sink_attention::tests {

SA_SUITE(emulated_global_faults) {
  DeviceArray<float> in("in", 100, 1.0f);
  DeviceArray<float> out("out", 64);
  DeviceArray<int> turn("turn", 1);
  const VisibleBuffers buffers({in.readable(), out.writable(), turn.readable()});

  expect_no_fault("inside", [&] {
    run_block(64, 0, [&](char*) { store_global(&out[thread_idx()], load_global(&in[36])); });
  });
  expect_fault(
      "a read past the end",
      {"load_global at read:1: a read out of bounds, nearest to in (400 bytes) at byte 400",
       "block (0, 0, 0), thread 31"},
      [&] { run_warp([&](char*) { load_global(&in[69 + lane_idx()], at("read")); }); });
  expect_fault("a read before the start", {"nearest to in (400 bytes) at byte -4"}, [&] {
    run_warp([&](char*) { load_global(in.data() + lane_idx() - 1, at("read")); });
  });
  expect_fault("a write past the end",
               {"store_global at write:1: a write out of bounds, nearest to out (256 bytes) at "
                "byte",
                "[block (2, 0, 0), thread"},
               [&] {
                 emulator::run_grid({3, 1, 1}, 32, 0, [&](char*) {
                   store_global(out.data() + block_idx().x * 32 + lane_idx(), 1.0f, at("write"));
                 });
               });
  expect_fault("a wide read across the end",
               {"load_global at read:1", "nearest to in (400 bytes) at byte 400"}, [&] {
                 run_warp([&](char*) {
                   load_global(reinterpret_cast<const Bytes16*>(&in[100]), at("read"));
                 });
               });
  expect_fault("a write to an input",
               {"store_global at write:1: a write to read-only in (400 bytes) at byte 8"},
               [&] { run_warp([&](char*) { store_global(&in[2], 1.0f, at("write")); }); });
  expect_fault("an atomic_add to an input", {"atomic_add at add:1: a write to read-only in"},
               [&] { run_warp([&](char*) { atomic_add(&in[2], 1.0f, at("add")); }); });
  expect_fault("a turn passed in a read-only buffer",
               {"semaphore_release at pass:1: a write to read-only"},
               [&] { run_warp([&](char*) { semaphore_release(turn.data(), 1, at("pass")); }); });
  expect_fault(
      "a misaligned read",
      {"load_global at read:1: a read that is not aligned to 16 bytes, nearest to in (400 "
       "bytes) at byte 8"},
      [&] {
        run_warp([&](char*) { load_global(reinterpret_cast<const Bytes16*>(&in[2]), at("read")); });
      });
  expect_fault("a copy from outside",
               {"cp_async_16 at copy:1: a read out of bounds, nearest to in (400 bytes)"}, [&] {
                 run_warp([&](char* shared) {
                   cp_async_16(shared + 16 * lane_idx(), in.data() + 4 * lane_idx(), true,
                               at("copy"));
                   cp_async_commit();
                   cp_async_wait<0>();
                 });
               });
  expect_fault("a null pointer", {"load_global at read:1: a read of a null pointer"}, [] {
    run_warp([](char*) { load_global(static_cast<const float*>(nullptr), at("read")); });
  });
  {
    const VisibleBuffers none({});
    expect_fault("no buffer at all", {"a read of global memory, of which no buffer was named"},
                 [&] { run_warp([&](char*) { load_global(&in[0]); }); });
  }
  expect_no_fault("the buffers of before are visible again",
                  [&] { run_warp([&](char*) { load_global(&in[0]); }); });
}

}  // namespace sink_attention::tests
