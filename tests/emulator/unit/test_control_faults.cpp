// Injected faults in control flow: diverged lanes, barriers that not all threads reach, endless
// waits.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

void warps_that_part() {
  expect_fault("lanes at two warp-wide instructions",
               {"lanes of a warp part: thread", "is at ", "shfl_xor at odd:1", "any at even:1"},
               [] {
                 run_warp([](char*) {
                   if (lane_idx() % 2 == 1)
                     shfl_xor(1, 1, at("odd"));
                   else
                     any(true, at("even"));
                 });
               });
  expect_fault("the same instruction at two places",
               {"lanes of a warp part", "shfl_xor at here:1", "shfl_xor at there:1"}, [] {
                 run_warp([](char*) { shfl_xor(1, 1, lane_idx() < 5 ? at("here") : at("there")); });
               });
  expect_fault(
      "some lanes leave out a shuffle",
      {"deadlock: block (0, 0, 0)", "warp 0", "7 lanes shfl_xor at exchange:1", "25 lanes done"},
      [] {
        run_warp([](char*) {
          if (lane_idx() < 7) shfl_xor(1, 1, at("exchange"));
        });
      });
  expect_fault("a product that one lane leaves out", {"deadlock", "31 lanes mma_m16n8k16 at mma:1"},
               [] {
                 run_warp([](char*) {
                   float acc[4] = {};
                   const uint32_t a[4] = {};
                   const uint32_t b[2] = {};
                   if (lane_idx() != 31) {
                     mma_m16n8k16<attention::BFloat16>(acc, a, b, at("mma"));
                   }
                 });
               });
}

// warp_idx() and warpgroup_idx() are shuffles on the device.
void numbers_of_warps() {
  expect_fault("half a warp asks for its number",
               {"deadlock", "16 lanes warp_idx at half:1, 16 lanes done"}, [] {
                 run_warp([](char*) {
                   if (lane_idx() < 16) warp_idx(at("half"));
                 });
               });
  expect_fault("half a warp asks, and then all meet",
               {"lanes of a warp part: thread", "warp_idx at half:1", "sync_warp at after:1"}, [] {
                 run_warp([](char*) {
                   if (lane_idx() < 16) warp_idx(at("half"));
                   sync_warp(at("after"));
                 });
               });
  expect_fault("half a warp asks before a barrier",
               {"lanes of a warp part: thread", "warp_idx at half:1", "sync_threads at after:1"},
               [] {
                 run_block(64, 0, [](char*) {
                   if (lane_idx() < 16) warp_idx(at("half"));
                   sync_threads(at("after"));
                 });
               });
  expect_fault("a loop that goes on for some lanes only",
               {"deadlock", "16 lanes warp_idx at loop:1, 16 lanes done"}, [] {
                 run_warp([](char*) {
                   for (int i = lane_idx(); i < 48; i += 32) warp_idx(at("loop"));
                 });
               });
  expect_fault("half a warp asks for its warpgroup",
               {"deadlock", "warp 2: 16 lanes warpgroup_idx at half:1, 16 lanes done"}, [] {
                 run_block(128, 0, [](char*) {
                   if (lane_idx() < 16) warpgroup_idx(at("half"));
                 });
               });
  expect_fault("one lane asks for its warpgroup, the others for their warp",
               {"lanes of a warp part: thread", "warpgroup_idx at one:1", "warp_idx at others:1"},
               [] {
                 run_block(128, 0, [](char*) {
                   if (lane_idx() == 9)
                     warpgroup_idx(at("one"));
                   else
                     warp_idx(at("others"));
                 });
               });
}

void barriers() {
  expect_fault("warps at two barriers",
               {"threads meet at different barriers: thread", "sync_threads at producer:1",
                "sync_threads at consumer:1"},
               [] {
                 run_block(64, 0, [](char*) {
                   if (warp_idx() == 0)
                     sync_threads(at("producer"));
                   else
                     sync_threads(at("consumer"));
                 });
               });
  expect_fault("lanes of a warp at two places of a named barrier",
               {"lanes of a warp part", "sync_named at here:1", "sync_named at there:1"}, [] {
                 run_block(64, 0, [](char*) {
                   sync_named(1, 64, lane_idx() < 9 ? at("here") : at("there"));
                 });
               });
  expect_fault(
      "lanes of a warp at two barriers",
      {"sync_named at odd:1: lanes of a warp come to barrier ", " for 64 threads, and to barrier "},
      [] { run_block(64, 0, [](char*) { sync_named(1 + lane_idx() % 2, 64, at("odd")); }); });
  expect_fault("the halves of a warp that arrive one after the other",
               {"lanes of a warp part: thread", "arrive_named at half:1", "any at between:1"}, [] {
                 run_block(64, 0, [](char*) {
                   for (int half = 0; half < 2; ++half) {
                     if (lane_idx() / 16 == half) arrive_named(1, 64, at("half"));
                     any(true, at("between"));
                   }
                 });
               });
  expect_fault("a warp that arrives twice",
               {"arrive_named at twice:1: warp 0 comes to barrier 1 again before all others came"},
               [] {
                 run_block(96, 0, [](char*) {
                   const bool mine = warp_idx() == 0;
                   for (int i = 0; i < 2 && mine; ++i) arrive_named(1, 96, at("twice"));
                 });
               });
  expect_fault("a barrier for two numbers of threads", {"threads meet at different barriers"}, [] {
    run_block(96, 0, [](char*) { sync_named(1, warp_idx() == 0 ? 64 : 96, at("count")); });
  });
  expect_fault("half warps at a barrier",
               {"deadlock", "warp 0: 16 lanes sync_named at half:1, 16 lanes done"}, [] {
                 run_block(64, 0, [](char*) {
                   if (lane_idx() < 16) sync_named(1, 32, at("half"));
                 });
               });
  expect_fault("a barrier that one warp leaves out",
               {"deadlock", "32 lanes sync_threads at barrier:1", "warp 2: 32 lanes done"}, [] {
                 run_block(96, 0, [](char*) {
                   if (warp_idx() != 2) sync_threads(at("barrier"));
                 });
               });
  expect_fault("a thread that returns early",
               {"deadlock", "warp 0: 32 lanes sync_threads at barrier:1",
                "warp 1: 8 lanes sync_threads at barrier:1, 1 lanes done, 23 lanes sync_threads"},
               [] {
                 run_block(64, 0, [](char*) {
                   if (thread_idx() == 40) return;
                   sync_threads(at("barrier"));
                 });
               });
  expect_fault("each warp's place",
               {"deadlock", "warp 0: 32 lanes sync_named at full:1",
                "warp 1: 32 lanes sync_named at empty:1"},
               [] {
                 run_block(64, 0, [](char*) {
                   if (warp_idx() == 0)
                     sync_named(1, 64, at("full"));
                   else
                     sync_named(2, 64, at("empty"));
                 });
               });
  expect_fault("barrier 0 by name", {"sync_named at zero:1: barrier 0, which is sync_threads' own"},
               [] { run_warp([](char*) { sync_named(0, 32, at("zero")); }); });
  expect_fault("barrier 16", {"sync_named at sixteen:1: barrier 16 of 16"},
               [] { run_warp([](char*) { sync_named(16, 32, at("sixteen")); }); });
  expect_fault("a barrier for more threads than there are",
               {"sync_named at all:1: a barrier for 64 threads"},
               [] { run_warp([](char*) { sync_named(1, 64, at("all")); }); });
  expect_fault("a barrier for part of a warp", {"a barrier for 48 threads"},
               [] { run_block(64, 0, [](char*) { sync_named(1, 48); }); });
  expect_fault("a barrier for nobody", {"a barrier for 0 threads"},
               [] { run_block(64, 0, [](char*) { sync_named(1, 0); }); });
}

void turns() {
  DeviceArray<int> turn("turn", 1);
  const VisibleBuffers buffers({turn.writable()});
  expect_fault(
      "a turn that nobody passes on",
      {"deadlock: block (1, 0, 0)", "1 lanes semaphore_wait at wait:1", "sync_threads at after:1"},
      [&] {
        turn[0] = 0;
        emulator::run_grid({4, 1, 1}, 32, 0, [&](char*) {
          if (thread_idx() == 0) semaphore_wait(turn.data(), block_idx().x, at("wait"));
          sync_threads(at("after"));
          if (thread_idx() == 0 && block_idx().x != 0) semaphore_release(turn.data(), 1);
        });
      });
  expect_fault("a turn that a later block has to pass on",
               {"deadlock: block (", "semaphore_wait at wait:1"}, [&] {
                 turn[0] = 3;
                 emulator::run_grid({4, 1, 1}, 32, 0, [&](char*) {
                   if (thread_idx() == 0) semaphore_wait(turn.data(), block_idx().x, at("wait"));
                   sync_threads(at("after"));
                   if (thread_idx() == 0) semaphore_release(turn.data(), block_idx().x - 1);
                 });
               });
}

// After a fault the next launch starts clean.
void after_a_fault() {
  expect_no_fault("a launch after faults", [] {
    run_block(128, 512, [](char* shared) {
      auto* words = reinterpret_cast<int*>(shared);
      store_shared(words + thread_idx(), thread_idx());
      sync_threads();
      check(load_shared(words + 127 - thread_idx()) == 127 - thread_idx(), "after a fault");
    });
  });
}

// The place that a message names by itself is the call in the kernel's source.
void default_place() {
  int line = 0;
  const std::string message = fault_of([&] {
    run_warp([&](char* shared) {
      line = __LINE__ + 1;
      load_shared(shared);
    });
  });
  const std::string expected = "load_shared at test_control_faults.cpp:" + std::to_string(line);
  check(message.find(expected) == 0, "\"", message, "\" names another place than ", expected);
}

void sizes() {
  expect_fault("a block of part of a warp", {"a block of 48 threads"},
               [] { run_block(48, 0, [](char*) {}); });
  expect_fault("a block of too many threads", {"a block of 544 threads"},
               [] { run_block(544, 0, [](char*) {}); });
}

}  // namespace

SA_SUITE(emulated_control_faults) {
  warps_that_part();
  numbers_of_warps();
  barriers();
  turns();
  after_a_fault();
  default_place();
  sizes();
}

}  // namespace sink_attention::tests
