// Injected faults in the use of wgmma. Each must be found in any order of threads, and the message
// must name its sites. test_wgmma_operand_faults.cpp has those in shared operands.
#include "wgmma_products.h"

namespace sink_attention::tests {
namespace {

// A use of accumulators between the start of their product and its wait.
void expect_refused(const char* name, const char* what, const std::function<void(float)>& use) {
  const std::string message =
      std::string(what) + " at use:1: uses accumulators of wgmma_ss at product:1";
  expect_fault(name, {message.c_str(), "a product that was not waited for"}, [&] {
    run_filled([&](char* shared) {
      Acc acc;
      warpgroup_arrive();
      start(acc, shared);
      wgmma_commit();
      use(acc[1][2]);
      wgmma_wait<0>();
    });
  });
}

void uses_before_the_wait() {
  DeviceArray<float> out("out", 128);
  const VisibleBuffers buffers({out.writable()});
  expect_refused("packed", "pack", [](float x) { pack<Element>(0.0f, x, at("use")); });
  expect_refused("exponentiated", "exp2_approx", [](float x) { exp2_approx(x, at("use")); });
  expect_refused("after arithmetic", "exp2_approx",
                 [](float x) { exp2_approx(-(x * 0.5f - 3.0f), at("use")); });
  expect_refused("divided by", "reciprocal_approx",
                 [](float x) { reciprocal_approx(x, at("use")); });
  expect_refused("stored", "store_global",
                 [&](float x) { store_global(out.data() + thread_idx(), x, at("use")); });
  expect_refused("added", "atomic_add", [&](float x) { atomic_add(out.data(), x, at("use")); });
  expect_refused("to another lane", "shfl_xor", [](float x) { shfl_xor(x, 1, at("use")); });
  expect_refused("summed up by mma", "mma_m16n8k16", [](float x) {
    float acc[4] = {0, 0, x, 0};
    const uint32_t a[4] = {}, b[2] = {};
    mma_m16n8k16<Element>(acc, a, b, at("use"));
  });
  expect_refused("held", "warpgroup_fence_operand", [](float x) {
    float acc[1][4] = {{x, 0, 0, 0}};
    warpgroup_fence_operand(acc, at("use"));
  });
  expect_fault("stored to shared memory beside others",
               {"store_shared at use:1: uses accumulators of wgmma_ss at product:1"}, [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared);
                   wgmma_commit();
                   const Float4 four{0, 0, 0, acc[0][0]};
                   store_shared(reinterpret_cast<Float4*>(shared) + thread_idx(), four, at("use"));
                 });
               });
  expect_fault("waited for one group too few",
               {"pack at use:1: uses accumulators of wgmma_ss at product:1"}, [] {
                 run_filled([](char* shared) {
                   Acc first, second;
                   warpgroup_arrive();
                   start(first, shared);
                   wgmma_commit();
                   start(second, shared);
                   wgmma_commit();
                   wgmma_wait<1>();
                   pack<Element>(first[0][0], first[0][1]);
                   pack<Element>(second[0][0], second[0][1], at("use"));
                 });
               });
}

void registers_changed() {
  expect_fault("accumulators written before the wait",
               {"wgmma_wait at wait:1: accumulators of wgmma_ss at product:1 were changed in "
                "thread 77"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared);
                   wgmma_commit();
                   if (thread_idx() == 77) acc[3][3] = 0.0f;
                   wgmma_wait<0>(at("wait"));
                 });
               });
  expect_fault(
      "operand A written before the wait",
      {"wgmma_wait at wait:1: operand A of wgmma_rs at product:1 was changed in thread 77"}, [] {
        run_filled([](char* shared) {
          Acc acc;
          Registers a = {};
          warpgroup_arrive();
          start(acc, a, shared);
          wgmma_commit();
          if (thread_idx() == 77) a[2] = 1;
          wgmma_wait<0>(at("wait"));
        });
      });
  expect_fault("products of two shapes on one accumulator",
               {"wgmma_ss at wide:1: its accumulators are partly those of wgmma_ss at product:1"},
               [] {
                 run_filled([](char* shared) {
                   float acc[2 * kTilesN][4];
                   warpgroup_arrive();
                   start(reinterpret_cast<Acc&>(acc), shared);
                   wgmma_ss<Element, Major::kK, Major::kK>(
                       acc, operand(shared, 0), operand(shared, 4096), false, at("wide"));
                 });
               });
}

void fences_and_commits() {
  expect_fault(
      "no fence at all",
      {"wgmma_ss at product:1: no warpgroup_arrive comes before the warpgroup's first product"},
      [] {
        run_filled([](char* shared) {
          Acc acc;
          start(acc, shared);
        });
      });
  expect_fault("no fence after a wait",
               {"wgmma_ss at product:1: no warpgroup_arrive has come since a wait gave these"}, [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared);
                   wgmma_commit();
                   wgmma_wait<0>();
                   start(acc, shared, true);
                 });
               });
  expect_fault("no fence after operand A is packed",
               {"wgmma_rs at product:1: no warpgroup_arrive has come since operand A was packed"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   Registers a;
                   warpgroup_arrive();
                   for (int i = 0; i < 4; ++i) a[i] = pack<Element>(thread_idx(), i);
                   start(acc, a, shared);
                 });
               });
  expect_fault("no commit",
               {"pack at use:1: uses accumulators of wgmma_ss at product:1",
                "(no wgmma_commit closed its group)"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared);
                   wgmma_wait<0>();
                   pack<Element>(acc[0][0], acc[0][1], at("use"));
                 });
               });
  expect_fault("no wait", {"wgmma_ss at product:1: the thread ended before it waited"}, [] {
    run_filled([](char* shared) {
      Acc acc;
      warpgroup_arrive();
      start(acc, shared);
      wgmma_commit();
    });
  });
  expect_fault("neither commit nor use", {"wgmma_ss at product:1: the thread ended"}, [] {
    run_filled([](char* shared) {
      Acc acc;
      warpgroup_arrive();
      start(acc, shared);
      wgmma_wait<0>();
    });
  });
}

void warpgroups() {
  expect_fault("another accumulate", {"wgmma_ss at product:1: thread 64 comes with another `acc"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared, thread_idx() >= 64);
                 });
               });
  expect_fault(
      "another descriptor", {"wgmma_ss at product:1: thread 9 comes with another desc"}, [] {
        run_filled([](char* shared) {
          Acc acc;
          warpgroup_arrive();
          wgmma_ss<Element, Major::kK, Major::kK>(acc, operand(shared, 0),
                                                  operand(shared, thread_idx() == 9 ? 4096 : 8192),
                                                  false, at("product"));
        });
      });
  expect_fault(
      "two places", {"lanes of a warpgroup part", "warpgroup_arrive at one:1", "at other:1"}, [] {
        run_filled([](char*) { warpgroup_arrive(warp_idx() == 2 ? at("one") : at("other")); });
      });
  expect_fault(
      "a warp that does not come",
      {"deadlock", "warp 0: 32 lanes warpgroup_arrive at fence:1", "warp 3: 32 lanes done"}, [] {
        run_filled([](char*) {
          if (warp_idx() != 3) warpgroup_arrive(at("fence"));
        });
      });
  expect_fault("part of a warpgroup",
               {"warpgroup_arrive at fence:1: a warpgroup is 4 warps, and only 64 threads"}, [] {
                 run_block(192, 0, [](char*) {
                   if (warp_idx() >= 4) warpgroup_arrive(at("fence"));
                 });
               });
  expect_no_fault("a launch after faults", [] {
    run_filled([](char* shared) {
      Acc acc;
      warpgroup_arrive();
      start(acc, shared);
      wgmma_commit();
      wgmma_wait<0>();
      check(acc[0][0] == 0.0f, "zeros times zeros");
    });
  });
}

}  // namespace

SA_SUITE(emulated_wgmma_faults) {
  uses_before_the_wait();
  registers_changed();
  fences_and_commits();
  warpgroups();
}

}  // namespace sink_attention::tests
