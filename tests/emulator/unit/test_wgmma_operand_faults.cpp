// Injected faults in wgmma's shared operands and descriptors. Each must be found in any order of
// threads, and the message must name its sites.
#include "wgmma_products.h"

namespace sink_attention::tests {
namespace {

void shared_operands() {
  const auto product = [](char* shared) {
    Acc acc;
    warpgroup_arrive();
    start(acc, shared);
    wgmma_commit();
    wgmma_wait<0>();
  };
  expect_fault("an operand that nobody has written",
               {"wgmma_ss at product:1: a read of shared byte 8192, which nobody has written"},
               [&] {
                 run_block(128, kBytes + kBBytes, [&](char* shared) {
                   fill(shared, 8192);
                   fence_proxy_async();
                   sync_threads();
                   product(shared);
                 });
               });
  expect_fault("no fence of the proxy",
               {"wgmma_ss at product:1: shared byte", "was written by thread",
                "in store_shared at fill:1", "no fence_proxy_async of that thread"},
               [&] {
                 run_block(128, kBytes + kBBytes, [&](char* shared) {
                   fill(shared, kBytes + kBBytes);
                   if (thread_idx() != 1) fence_proxy_async();
                   sync_threads();
                   product(shared);
                 });
               });
  expect_fault("the proxy's fence comes after the barrier",
               {"wgmma_ss at product:1: shared byte", "no fence_proxy_async of that thread"}, [&] {
                 run_block(128, kBytes + kBBytes, [&](char* shared) {
                   fill(shared, kBytes + kBBytes);
                   sync_threads();
                   fence_proxy_async();
                   product(shared);
                 });
               });
  expect_fault("no barrier",
               {"wgmma_ss at product:1: a race: shared byte",
                "in store_shared at fill:1, and no barrier comes before this read"},
               [&] {
                 run_block(128, kBytes + kBBytes, [&](char* shared) {
                   fill(shared, kBytes + kBBytes);
                   fence_proxy_async();
                   product(shared);
                 });
               });
  expect_fault("an operand written before the wait",
               {"store_shared at overwrite:1: a write to shared byte 8192, which is being read by "
                "wgmma_ss at product:1"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   warpgroup_arrive();
                   start(acc, shared);
                   wgmma_commit();
                   if (thread_idx() == 50) {
                     store_shared(reinterpret_cast<int*>(shared + 8192), 1, at("overwrite"));
                   }
                   wgmma_wait<0>();
                 });
               });
  // Before the product, during it or after its wait: that depends on the seed.
  expect_fault("an operand written by a warp that no barrier orders",
               {"shared byte 8192", "at overwrite:1", "at product:1"}, [] {
                 run_block(160, kBytes + kBBytes, [](char* shared) {
                   if (warp_idx() < 4) fill(shared, kBytes + kBBytes);
                   fence_proxy_async();
                   sync_threads();
                   if (thread_idx() == 128) {
                     store_shared(reinterpret_cast<int*>(shared + 8192), 1, at("overwrite"));
                   }
                   if (warp_idx() < 4) {
                     Acc acc;
                     warpgroup_arrive();
                     start(acc, shared);
                     wgmma_commit();
                     wgmma_wait<0>();
                   }
                 });
               });
  // One thread's word that its warpgroup's product has ended is enough, once it has.
  const auto hand_back = [](bool early) {
    run_block(160, kBytes + kBBytes + 16, [early](char* shared) {
      auto* empty = reinterpret_cast<Mbarrier*>(shared + kBytes + kBBytes);
      if (thread_idx() == 0) {
        mbarrier_init(empty, 1);
        fence_mbarrier_init();
      }
      if (warp_idx() < 4) fill(shared, kBytes + kBBytes);
      fence_proxy_async();
      sync_threads();
      for (int round = 0; round < 2; ++round) {
        if (warp_idx() < 4) {
          Acc acc;
          warpgroup_arrive();
          start(acc, shared);
          wgmma_commit();
          if (early && round == 1 && thread_idx() == 37) mbarrier_arrive(empty);
          wgmma_wait<0>();
          if (!(early && round == 1) && thread_idx() == 37) mbarrier_arrive(empty);
        } else if (lane_idx() == 9) {
          mbarrier_wait(empty, round);
          if (round == 1) store_shared(reinterpret_cast<int*>(shared + kBytes), 1, at("overwrite"));
        }
      }
    });
  };
  expect_no_fault("an operand handed back by one thread", [&] { hand_back(false); });
  expect_fault("an operand handed back before the wait",
               {"store_shared at overwrite:1: a", "shared byte 8192", "wgmma_ss at product:1"},
               [&] { hand_back(true); });
  expect_no_fault("an operand written after the wait", [] {
    run_filled([](char* shared) {
      Acc acc;
      warpgroup_arrive();
      start(acc, shared);
      wgmma_commit();
      wgmma_wait<0>();
      sync_threads();
      store_shared(reinterpret_cast<int*>(shared + 8192) + thread_idx(), 1);
    });
  });
  expect_fault("an operand beyond the end",
               {"wgmma_ss at product:1: a read outside of shared memory: byte"}, [&] {
                 run_block(128, kBytes, [&](char* shared) {
                   fill(shared, kBytes);
                   fence_proxy_async();
                   sync_threads();
                   product(shared);
                 });
               });
}

void descriptors() {
  expect_fault("a start between chunks",
               {"matrix_descriptor at here:1: the start's address in shared memory is 8, no"}, [] {
                 run_filled([](char* shared) {
                   matrix_descriptor(shared + 8, 0, 1024, Swizzle::k128, at("here"));
                 });
               });
  expect_fault("a stride too large", {"matrix_descriptor at here:1: stride_bytes is 262144"}, [] {
    run_filled(
        [](char* shared) { matrix_descriptor(shared, 0, 1 << 18, Swizzle::k128, at("here")); });
  });
  const auto with = [](uint64_t a) {
    return [a] {
      run_filled([a](char* shared) {
        Acc acc;
        warpgroup_arrive();
        wgmma_ss<Element, Major::kK, Major::kK>(acc, operand(shared, 0) + a, operand(shared, 8192),
                                                false, at("product"));
      });
    };
  };
  expect_fault("a base offset",
               {"wgmma_ss at product:1: the descriptor of A has bits outside of its fields"},
               with(uint64_t{1} << 49));
  expect_fault("a start in a row's last chunk",
               {"wgmma_ss at product:1: the descriptor of A starts so far into a row"}, with(7));
}

}  // namespace

SA_SUITE(emulated_wgmma_operand_faults) {
  shared_operands();
  descriptors();
}

}  // namespace sink_attention::tests
