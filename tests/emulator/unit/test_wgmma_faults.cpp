// Planted faults in the use of wgmma: each must be found, whatever the order of threads, and its
// places named.
#include "emulated.h"
#include "primitives/bulk.h"
#include "primitives/wgmma.h"

namespace sink_attention::tests {
namespace {

using Element = attention::BFloat16;

constexpr int kBytes = 8192;  // of A, 64 rows of 128 bytes; B, 32 rows, follows
constexpr int kBBytes = 4096;
constexpr int kTilesN = 4;
using Acc = float[kTilesN][4];
using Registers = uint32_t[4];

// Both operands are 32 or 64 rows of 64 columns, of which a product takes 16.
uint64_t operand(char* shared, int at) {
  return matrix_descriptor(shared + at, 0, 1024, Swizzle::k128);
}

void fill(char* shared, int bytes) {
  for (int at = thread_idx() * 16; at < bytes; at += 128 * 16) {
    store_shared(reinterpret_cast<Bytes16*>(shared + at), Bytes16{}, tests::at("fill"));
  }
}

// A kernel of one warpgroup whose operands are there.
void run_filled(const std::function<void(char*)>& body) {
  run_block(128, kBytes + kBBytes, [&](char* shared) {
    fill(shared, kBytes + kBBytes);
    fence_proxy_async();
    sync_threads();
    body(shared);
  });
}

void start(Acc& acc, char* shared, bool accumulate = false) {
  wgmma_ss<Element, Major::kK, Major::kK>(acc, operand(shared, 0), operand(shared, 8192),
                                          accumulate, at("product"));
}
void start(Acc& acc, const Registers& a, char* shared) {
  wgmma_rs<Element, Major::kK>(acc, a, operand(shared, 8192), false, at("product"));
}

// A use of accumulators between the start of their product and its wait.
void expect_refused(const char* name, const char* what, const std::function<void(float)>& use) {
  const std::string message =
      std::string(what) + " at use:1: uses accumulators of wgmma_ss at product:1";
  expect_fault(name, {message.c_str(), "a product that was not waited for"}, [&] {
    run_filled([&](char* shared) {
      Acc acc;
      wgmma_fence();
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
  expect_refused("held", "wgmma_hold", [](float x) {
    float acc[1][4] = {{x, 0, 0, 0}};
    wgmma_hold(acc, at("use"));
  });
  expect_fault("stored to shared memory beside others",
               {"store_shared at use:1: uses accumulators of wgmma_ss at product:1"}, [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   wgmma_fence();
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
                   wgmma_fence();
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
                   wgmma_fence();
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
          wgmma_fence();
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
                   wgmma_fence();
                   start(reinterpret_cast<Acc&>(acc), shared);
                   wgmma_ss<Element, Major::kK, Major::kK>(
                       acc, operand(shared, 0), operand(shared, 4096), false, at("wide"));
                 });
               });
}

void fences_and_commits() {
  expect_fault("no fence at all",
               {"wgmma_ss at product:1: no wgmma_fence comes before the warpgroup's first product"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   start(acc, shared);
                 });
               });
  expect_fault("no fence after a wait",
               {"wgmma_ss at product:1: no wgmma_fence has come since a wait gave these"}, [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   wgmma_fence();
                   start(acc, shared);
                   wgmma_commit();
                   wgmma_wait<0>();
                   start(acc, shared, true);
                 });
               });
  expect_fault("no fence after operand A is packed",
               {"wgmma_rs at product:1: no wgmma_fence has come since operand A was packed"}, [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   Registers a;
                   wgmma_fence();
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
                   wgmma_fence();
                   start(acc, shared);
                   wgmma_wait<0>();
                   pack<Element>(acc[0][0], acc[0][1], at("use"));
                 });
               });
  expect_fault("no wait", {"wgmma_ss at product:1: the thread ended before it waited"}, [] {
    run_filled([](char* shared) {
      Acc acc;
      wgmma_fence();
      start(acc, shared);
      wgmma_commit();
    });
  });
  expect_fault("neither commit nor use", {"wgmma_ss at product:1: the thread ended"}, [] {
    run_filled([](char* shared) {
      Acc acc;
      wgmma_fence();
      start(acc, shared);
      wgmma_wait<0>();
    });
  });
}

void shared_operands() {
  const auto product = [](char* shared) {
    Acc acc;
    wgmma_fence();
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
                   wgmma_fence();
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
                     wgmma_fence();
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
          wgmma_fence();
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
      wgmma_fence();
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
        wgmma_fence();
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

void warpgroups() {
  expect_fault("another accumulate", {"wgmma_ss at product:1: thread 64 comes with another `acc"},
               [] {
                 run_filled([](char* shared) {
                   Acc acc;
                   wgmma_fence();
                   start(acc, shared, thread_idx() >= 64);
                 });
               });
  expect_fault(
      "another descriptor", {"wgmma_ss at product:1: thread 9 comes with another desc"}, [] {
        run_filled([](char* shared) {
          Acc acc;
          wgmma_fence();
          wgmma_ss<Element, Major::kK, Major::kK>(acc, operand(shared, 0),
                                                  operand(shared, thread_idx() == 9 ? 4096 : 8192),
                                                  false, at("product"));
        });
      });
  expect_fault(
      "two places", {"lanes of a warpgroup part", "wgmma_fence at one:1", "at other:1"},
      [] { run_filled([](char*) { wgmma_fence(warp_idx() == 2 ? at("one") : at("other")); }); });
  expect_fault("a warp that does not come",
               {"deadlock", "warp 0: 32 lanes wgmma_fence at fence:1", "warp 3: 32 lanes done"},
               [] {
                 run_filled([](char*) {
                   if (warp_idx() != 3) wgmma_fence(at("fence"));
                 });
               });
  expect_fault("part of a warpgroup",
               {"wgmma_fence at fence:1: a warpgroup is 4 warps, and only 64 threads"}, [] {
                 run_block(192, 0, [](char*) {
                   if (warp_idx() >= 4) wgmma_fence(at("fence"));
                 });
               });
  expect_no_fault("a launch after faults", [] {
    run_filled([](char* shared) {
      Acc acc;
      wgmma_fence();
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
  shared_operands();
  descriptors();
  warpgroups();
}

}  // namespace sink_attention::tests
