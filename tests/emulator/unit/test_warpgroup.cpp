// Registers of warpgroups (setmaxnreg).
#include "emulated.h"

namespace sink_attention::tests {
namespace {

void run(int warpgroups, const std::function<void(char*)>& body) {
  run_block(128 * warpgroups, 128, body);
}

void budgets() {
  expect_no_fault("a producer gives, two consumers take", [] {
    run(3, [](char*) {
      check(warpgroup_idx() == thread_idx() / 128, "warpgroup of thread ", thread_idx());
      if (warpgroup_idx() == 0) {
        warpgroup_reg_dealloc<24>();
      } else {
        warpgroup_reg_alloc<240>();
      }
    });
  });
  // 512 threads are launched with 128 each.
  expect_no_fault("three consumers", [] {
    run(4, [](char*) {
      if (warpgroup_idx() == 0) {
        warpgroup_reg_dealloc<32>();
      } else {
        warpgroup_reg_alloc<160>();
      }
    });
  });
  expect_fault("more than there are",
               {"deadlock", "warpgroup_reg_alloc at take:1",
                "has 168 registers a thread and waits for 256", "of 64512 are in use"},
               [] {
                 run(3, [](char*) {
                   if (warpgroup_idx() == 0) {
                     warpgroup_reg_dealloc<24>();
                   } else {
                     warpgroup_reg_alloc<256>(at("take"));
                   }
                 });
               });
  // 32 + 2 * 240 fit into 65536 registers, but not into the 3 * 168 * 128 of the launch.
  expect_fault("more than the block was launched with",
               {"deadlock", "warpgroup_reg_alloc at take:1",
                "has 168 registers a thread and waits for 240", "of 64512 are in use"},
               [] {
                 run(3, [](char*) {
                   if (warpgroup_idx() == 0) {
                     warpgroup_reg_dealloc<32>();
                   } else {
                     warpgroup_reg_alloc<240>(at("take"));
                   }
                 });
               });
  expect_fault("nobody gives", {"deadlock", "warpgroup_reg_alloc at take:1"}, [] {
    run(3, [](char*) {
      if (warpgroup_idx() != 0) warpgroup_reg_alloc<240>(at("take"));
    });
  });
}

void misuse() {
  expect_fault("no multiple of 8",
               {"warpgroup_reg_dealloc at give:1: 28 registers, not a multiple of 8"},
               [] { run(1, [](char*) { warpgroup_reg_dealloc<28>(at("give")); }); });
  expect_fault("too few",
               {"warpgroup_reg_dealloc at give:1: 16 registers, not a multiple of 8 from 24"},
               [] { run(1, [](char*) { warpgroup_reg_dealloc<16>(at("give")); }); });
  expect_fault("too many", {"warpgroup_reg_alloc at take:1: 264 registers"},
               [] { run(1, [](char*) { warpgroup_reg_alloc<264>(at("take")); }); });
  expect_fault("a gift that takes", {"warpgroup_reg_dealloc at give:1: keeps 240 registers of 168"},
               [] { run(3, [](char*) { warpgroup_reg_dealloc<240>(at("give")); }); });
  expect_fault("a demand that gives",
               {"warpgroup_reg_alloc at take:1: takes 32 registers and has 168"},
               [] { run(3, [](char*) { warpgroup_reg_alloc<32>(at("take")); }); });
  expect_fault("twice",
               {"warpgroup_reg_alloc at take:1: the second change of registers, after "
                "warpgroup_reg_dealloc at "
                "give:1"},
               [] {
                 run(1, [](char*) {
                   warpgroup_reg_dealloc<32>(at("give"));
                   warpgroup_reg_alloc<64>(at("take"));
                 });
               });
  expect_fault(
      "three warps of four",
      {"warpgroup_reg_dealloc at give:1: warp", "came, and warp 2 of its warpgroup did not"}, [] {
        run(2, [](char*) {
          if (warp_idx() != 2) warpgroup_reg_dealloc<32>(at("give"));
        });
      });
  expect_fault("warps of one warpgroup at two places",
               {"the warps of a warpgroup part: warp", "warpgroup_reg_dealloc at "}, [] {
                 run(1, [](char*) {
                   if (warp_idx() == 1) {
                     warpgroup_reg_dealloc<32>(at("one"));
                   } else {
                     warpgroup_reg_dealloc<32>(at("another"));
                   }
                 });
               });
  expect_fault("lanes of a warp", {"deadlock", "31 lanes warpgroup_reg_dealloc at give:1"}, [] {
    run(1, [](char*) {
      if (lane_idx() != 31) warpgroup_reg_dealloc<32>(at("give"));
    });
  });
  expect_fault("no whole warpgroup",
               {"warpgroup_reg_dealloc at give:1: warp", "is of no whole warpgroup"},
               [] { run_block(64, 128, [](char*) { warpgroup_reg_dealloc<32>(at("give")); }); });
}

}  // namespace

SA_SUITE(emulated_warpgroup) {
  budgets();
  misuse();
}

}  // namespace sink_attention::tests
