// Bytes that are written through the generic proxy, and then read or overwritten through the async
// proxy: each writing thread's fence_proxy_async must come in between.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

constexpr int kBarrierByte = 4096;
constexpr int kSharedBytes = kBarrierByte + 64;

float* word(char* shared, int i) { return reinterpret_cast<float*>(shared) + i; }
Mbarrier* barrier(char* shared, int i = 0) {
  return reinterpret_cast<Mbarrier*>(shared + kBarrierByte) + i;
}

// A warp fills 128 bytes in the way of `fill`, then one lane starts `copy`.
struct Case {
  std::function<void(char*)> fill;
  std::function<void(char*)> copy;
};

void run(const Case& of) {
  run_block(64, kSharedBytes, [&](char* shared) {
    if (thread_idx() == 0) {
      mbarrier_init(barrier(shared), 1);
      fence_mbarrier_init();
    }
    sync_threads();
    if (warp_idx() == 1) of.fill(shared);
    sync_threads();
    if (thread_idx() == 3) of.copy(shared);
  });
}

void fences() {
  DeviceArray<float> global("global", 64, 1.0f);
  const VisibleBuffers buffers({global.writable()});
  const auto store = [](char* shared) {
    store_shared(word(shared, lane_idx()), 1.0f, at("write"));
  };
  const auto copy_in = [&](char* shared) {
    cp_async_16(shared + 16 * (lane_idx() % 8), &global[0], true, at("write"));
    cp_async_commit();
  };
  const auto add = [&](char* shared) {
    bulk_reduce_add(&global[0], word(shared, 0), 128, at("async"));
    bulk_commit();
    bulk_wait<0>();
  };
  const auto load = [&](char* shared) {
    mbarrier_arrive_expect_tx(barrier(shared), 128);
    bulk_load(shared, &global[0], 128, barrier(shared), at("async"));
    mbarrier_wait(barrier(shared), 0);
  };
  const auto load_box = [&](char* shared) {
    const TensorMap map = encode_tensor_map(
        {global.data(), 2, 3, {16, 4, 1}, {2, 32, 128}, {16, 4, 1}, Swizzle::kNone});
    mbarrier_arrive_expect_tx(barrier(shared), 128);
    tma_load(shared, &map, barrier(shared), {0, 0, 0}, at("async"));
    mbarrier_wait(barrier(shared), 0);
  };
  struct {
    const char* name;
    std::function<void(char*)> run;
  } const copies[] = {{"a sum", add}, {"a load", load}, {"a load of a box", load_box}};
  for (const auto& copy : copies) {
    std::printf("  %s\n", copy.name);
    expect_no_fault("each thread's fence", [&] {
      run({[&](char* shared) {
             store(shared);
             fence_proxy_async();
           },
           copy.run});
    });
    expect_fault(
        "no fence",
        {"at async:1: shared byte 0 was written by thread 32 in store_shared at write:1, and "
         "no fence_proxy_async of that thread comes in between"},
        [&] { run({store, copy.run}); });
    expect_fault("the fence of one lane",
                 {"at async:1: shared byte 4 was written by thread 33", "no fence_proxy_async"},
                 [&] {
                   run({[&](char* shared) {
                          store(shared);
                          if (lane_idx() == 0) fence_proxy_async();
                        },
                        copy.run});
                 });
    expect_fault("the fence before the store",
                 {"at async:1: shared byte 0", "no fence_proxy_async"}, [&] {
                   run({[&](char* shared) {
                          fence_proxy_async();
                          store(shared);
                        },
                        copy.run});
                 });
    expect_fault("the fence of the thread that starts the copy",
                 {"at async:1: shared byte 0", "no fence_proxy_async of that thread"}, [&] {
                   run({store, [&](char* shared) {
                          fence_proxy_async();
                          copy.run(shared);
                        }});
                 });
    expect_no_fault("cp.async, waited for and fenced", [&] {
      run_block(64, kSharedBytes, [&](char* shared) {
        if (thread_idx() == 0) {
          mbarrier_init(barrier(shared), 1);
          fence_mbarrier_init();
        }
        sync_threads();
        if (thread_idx() < 8) {
          copy_in(shared);
          cp_async_wait<0>();
          fence_proxy_async();
        }
        sync_threads();
        if (thread_idx() == 40) copy.run(shared);
      });
    });
    expect_fault("cp.async, fenced before it was waited for",
                 {"at async:1: shared byte", "in cp_async_16 at write:1, and no fence_proxy_async"},
                 [&] {
                   run({[&](char* shared) {
                          if (lane_idx() >= 8) return;
                          copy_in(shared);
                          fence_proxy_async();
                          cp_async_wait<0>();
                        },
                        copy.run});
                 });
  }
  // The fence is the writer's, and comes after the barrier that was to order it.
  expect_fault("the fence after the barrier", {"at async:1: shared byte 0", "no fence_proxy_async"},
               [&] {
                 run_block(64, kSharedBytes, [&](char* shared) {
                   if (warp_idx() == 1) store(shared);
                   sync_threads();
                   if (warp_idx() == 1) fence_proxy_async();
                   if (thread_idx() == 3) add(shared);
                 });
               });
  expect_no_fault("a copy over a copy, a store after a copy, and no fence", [&] {
    run({[&](char*) {},
         [&](char* shared) {
           load(shared);
           mbarrier_arrive_expect_tx(barrier(shared), 128);
           bulk_load(shared, &global[0], 128, barrier(shared));
           mbarrier_wait(barrier(shared), 1);
           store_shared(word(shared, 0), 1.0f);
         }});
  });
}

// Reads on behalf of a warpgroup, as its products make them.
void reads_of_a_warpgroup() {
  using emulator::AsyncReader;
  constexpr emulator::Step kProduct{"product", at("async")};
  const auto read = [=](char* shared) {  // by the last of the 128 threads that comes
    sync_named(1, 128);
    if (thread_idx() == 77)
      emulator::begin_async_read(shared, 512, AsyncReader::kWarpgroup, kProduct);
    sync_named(1, 128);
  };
  const auto end = [=](char* shared) {
    if (thread_idx() == 77)
      emulator::end_async_read(shared, 512, AsyncReader::kWarpgroup, kProduct);
    sync_named(1, 128);
  };
  const auto fill = [](char* shared) {
    store_shared(word(shared, thread_idx() % 128), 1.0f, at("write"));
    fence_proxy_async();
  };
  expect_no_fault("filled, read, and filled again", [=] {
    run_block(128, kSharedBytes, [=](char* shared) {
      for (int round = 0; round < 3; ++round) {
        fill(shared);
        read(shared);
        end(shared);
      }
    });
  });
  expect_fault(
      "a store into what is being read",
      {"store_shared at write:1: a write to shared byte", "being read by product at async:1"}, [=] {
        run_block(128, kSharedBytes, [=](char* shared) {
          fill(shared);
          read(shared);
          fill(shared);
        });
      });
  expect_fault(
      "two reads, and a store after the first has ended",
      {"store_shared at write:1: a write to shared byte", "being read by product at async:1"}, [=] {
        run_block(128, kSharedBytes, [=](char* shared) {
          fill(shared);
          read(shared);
          read(shared);
          end(shared);
          fill(shared);
        });
      });
  // Before the end of the read, or after it: that depends on the seed.
  expect_fault("another warpgroup's store after an arrival before the end",
               {"store_shared at write:1: a ", "read by ", "product at async:1"}, [=] {
                 run_block(256, kSharedBytes, [=](char* shared) {
                   if (thread_idx() == 0) {
                     mbarrier_init(barrier(shared), 128);
                     fence_mbarrier_init();
                   }
                   if (thread_idx() < 128) fill(shared);
                   sync_threads();
                   if (thread_idx() < 128) {
                     read(shared);
                     mbarrier_arrive(barrier(shared));
                     sync_named(1, 128);
                     end(shared);
                   } else {
                     mbarrier_wait(barrier(shared), 0);
                     store_shared(word(shared, thread_idx() % 128), 1.0f, at("write"));
                   }
                 });
               });
  expect_no_fault("another warpgroup's store after one thread's arrival", [=] {
    run_block(256, kSharedBytes, [=](char* shared) {
      if (thread_idx() == 0) {
        mbarrier_init(barrier(shared), 1);
        fence_mbarrier_init();
      }
      if (thread_idx() < 128) fill(shared);
      sync_threads();
      if (thread_idx() < 128) {
        read(shared);
        end(shared);
        if (thread_idx() == 13) mbarrier_arrive(barrier(shared));
      } else {
        mbarrier_wait(barrier(shared), 0);
        store_shared(word(shared, thread_idx() % 128), 1.0f);
      }
    });
  });
  expect_fault("a read that one warp has not waited to make",
               {"product at async:1: ", "shared byte"}, [=] {
                 run_block(256, kSharedBytes, [=](char* shared) {
                   if (thread_idx() == 0) {
                     mbarrier_init(barrier(shared), 128);
                     fence_mbarrier_init();
                   }
                   sync_threads();
                   if (thread_idx() >= 128) {
                     fill(shared);
                     mbarrier_arrive(barrier(shared));
                     return;
                   }
                   if (warp_idx() != 3) mbarrier_wait(barrier(shared), 0);
                   // As wgmma does: all lanes come, and that orders nothing among them.
                   if (thread_idx() == 77) {
                     emulator::begin_async_read(shared, 512, AsyncReader::kWarpgroup, kProduct);
                   }
                 });
               });
}

}  // namespace

SA_SUITE(emulated_proxy_faults) {
  fences();
  reads_of_a_warpgroup();
}

}  // namespace sink_attention::tests
