// mbarriers: phases, the order that they give, and injected faults in their use.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

constexpr int kSharedBytes = 4096;

int* word(char* shared, int i) { return reinterpret_cast<int*>(shared + 1024) + i; }
Mbarrier* barrier(char* shared, int i = 0) { return reinterpret_cast<Mbarrier*>(shared) + i; }

// Barriers for counts[0], counts[1], ... arrivals, ready for the whole block.
void make(char* shared, std::initializer_list<int> counts) {
  if (thread_idx() == 0) {
    int i = 0;
    for (const int count : counts) mbarrier_init(barrier(shared, i++), count, at("init"));
    fence_mbarrier_init();
  }
  sync_threads();
}

// A ring of two stages: warp 0 fills them, warps 1 and 2 read them; `full` and `empty` are barriers
// of 32 and 64 arrivals, or of one arrival a warp.
void ring(bool lane_per_warp, int rounds) {
  run_block(96, kSharedBytes, [=](char* shared) {
    const int producers = lane_per_warp ? 1 : 32;
    const int consumers = lane_per_warp ? 2 : 64;
    make(shared, {producers, producers, consumers, consumers});
    const auto arrive = [&](Mbarrier* at) {
      if (lane_per_warp) sync_warp();
      if (!lane_per_warp || lane_idx() == 0) mbarrier_arrive(at);
    };
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % 2;
      const int parity = round / 2 % 2;
      int* mine = word(shared, 32 * stage);
      if (warp_idx() == 0) {
        mbarrier_wait(barrier(shared, 2 + stage), parity ^ 1);
        store_shared(mine + lane_idx(), 100 * round + lane_idx());
        arrive(barrier(shared, stage));
      } else {
        mbarrier_wait(barrier(shared, stage), parity);
        const int found = load_shared(mine + (lane_idx() ^ 5));
        check(found == 100 * round + (lane_idx() ^ 5), "round ", round, ": ", found);
        arrive(barrier(shared, 2 + stage));
      }
    }
  });
}

void phases() {
  for (const bool lane_per_warp : {false, true}) {
    expect_no_fault("a ring of stages", [=] { ring(lane_per_warp, 9); });
  }
  expect_no_fault("a wait for the phase before the first", [] {
    run_warp([](char* shared) {
      make(shared, {32});
      mbarrier_wait(barrier(shared), 1);
      mbarrier_arrive(barrier(shared));
      mbarrier_wait(barrier(shared), 0);
    });
  });
  expect_no_fault("one lane writes after the warp has met, and arrives", [] {
    run_block(64, kSharedBytes, [](char* shared) {
      make(shared, {1});
      if (warp_idx() == 0) {
        store_shared(word(shared, lane_idx()), 1);
        sync_warp();
        if (lane_idx() == 0) {
          store_shared(word(shared, 40), 2);
          mbarrier_arrive(barrier(shared));
        }
      } else {
        mbarrier_wait(barrier(shared), 0);
        load_shared(word(shared, lane_idx() ^ 1));
        load_shared(word(shared, 40));
      }
    });
  });
  expect_no_fault("what one lane has waited for, told to its warp and handed on", [] {
    run_block(96, kSharedBytes, [](char* shared) {
      make(shared, {1, 1});
      const int warp = warp_idx();
      if (thread_idx() == 0) {
        store_shared(word(shared, 0), 1);
        mbarrier_arrive(barrier(shared));
      } else if (warp == 1) {
        if (lane_idx() == 7) mbarrier_wait(barrier(shared), 0);
        sync_warp();
        if (lane_idx() == 9) mbarrier_arrive(barrier(shared, 1));
      } else if (warp == 2) {
        mbarrier_wait(barrier(shared, 1), 0);
        load_shared(word(shared, 0));
      }
    });
  });
}

void missing_order() {
  expect_fault("no arrival after the write", {"a race: shared byte", "at write:1"}, [] {
    run_block(64, kSharedBytes, [](char* shared) {
      make(shared, {32});
      if (warp_idx() == 0) {
        mbarrier_arrive(barrier(shared));
        store_shared(word(shared, lane_idx()), 1, at("write"));
      } else {
        store_shared(word(shared, 32 + lane_idx()), 1);
        mbarrier_wait(barrier(shared), 0);
        store_shared(word(shared, lane_idx()), 1, at("write"));
      }
    });
  });
  expect_fault("one lane arrives for its warp, which did not meet",
               {"a race: shared byte", "at read:1", "at write:1"}, [] {
                 run_block(64, kSharedBytes, [](char* shared) {
                   make(shared, {1});
                   if (thread_idx() < 32) store_shared(word(shared, lane_idx()), 1);
                   sync_threads();
                   if (warp_idx() == 0) {
                     load_shared(word(shared, lane_idx()), at("read"));
                     if (lane_idx() == 3) mbarrier_arrive(barrier(shared));
                   } else {
                     mbarrier_wait(barrier(shared), 0);
                     store_shared(word(shared, lane_idx()), 2, at("write"));
                   }
                 });
               });
  expect_fault("one lane waits for its warp, which does not meet", {"load_shared at read:1: a "},
               [] {
                 run_block(64, kSharedBytes, [](char* shared) {
                   make(shared, {32});
                   if (warp_idx() == 0) {
                     store_shared(word(shared, lane_idx()), 1, at("write"));
                     mbarrier_arrive(barrier(shared));
                   } else {
                     if (lane_idx() == 0) mbarrier_wait(barrier(shared), 0);
                     any(true);
                     load_shared(word(shared, lane_idx()), at("read"));
                   }
                 });
               });
  expect_fault("a wait with the parity of the phase before", {"load_shared at read:1: a "}, [] {
    run_block(64, kSharedBytes, [](char* shared) {
      make(shared, {32});
      if (warp_idx() == 0) {
        sync_named(1, 64);
        store_shared(word(shared, lane_idx()), 1, at("write"));
        mbarrier_arrive(barrier(shared));
      } else {
        mbarrier_wait(barrier(shared), 1);
        sync_named(1, 64);
        load_shared(word(shared, lane_idx()), at("read"));
      }
    });
  });
}

void misuse() {
  expect_fault(
      "an mbarrier that nobody made",
      {"mbarrier_arrive at use:1: an mbarrier at shared byte 8 that nobody has initialised"}, [] {
        run_warp([](char* shared) {
          make(shared, {1});
          mbarrier_arrive(barrier(shared, 1), at("use"));
        });
      });
  expect_fault("no barrier after the making", {"at use:1: "}, [] {
    run_block(64, kSharedBytes, [](char* shared) {
      if (thread_idx() == 0) {
        mbarrier_init(barrier(shared), 64, at("init"));
        fence_mbarrier_init();
      }
      mbarrier_arrive(barrier(shared), at("use"));
    });
  });
  expect_fault("no fence after the making",
               {"mbarrier_arrive at use:1",
                "thread 0 in mbarrier_init at init:1 is used before that "
                "thread's fence_mbarrier_init"},
               [] {
                 run_block(64, kSharedBytes, [](char* shared) {
                   if (thread_idx() == 0) mbarrier_init(barrier(shared), 32, at("init"));
                   sync_threads();
                   if (warp_idx() == 1) mbarrier_arrive(barrier(shared), at("use"));
                 });
               });
  expect_fault(
      "more arrivals than the phase takes",
      {"mbarrier_arrive at use:1: more arrivals than the 2 of the mbarrier's phase 0, which "
       "waits for 16 bytes"},
      [] {
        run_warp([](char* shared) {
          make(shared, {2});
          if (lane_idx() == 0) mbarrier_arrive_expect_tx(barrier(shared), 16);
          sync_warp();
          if (lane_idx() < 2) mbarrier_arrive(barrier(shared), at("use"));
        });
      });
  expect_fault(
      "initialised again while a thread waits",
      {"mbarrier_init at again:1: the mbarrier of mbarrier_init at init:1, for which thread",
       "waits"},
      [] {
        run_block(64, kSharedBytes, [](char* shared) {
          make(shared, {2, 1});
          if (thread_idx() == 0) {
            mbarrier_arrive(barrier(shared, 1));  // no other thread runs before the wait
            mbarrier_wait(barrier(shared), 0);
          } else if (thread_idx() == 32) {
            mbarrier_wait(barrier(shared, 1), 0);
            mbarrier_init(barrier(shared), 2, at("again"));
          }
        });
      });
  expect_fault("initialised again in the middle of a phase",
               {"mbarrier_init at again:1: the mbarrier of mbarrier_init at init:1 in the middle"},
               [] {
                 run_warp([](char* shared) {
                   make(shared, {2});
                   if (lane_idx() != 0) return;
                   mbarrier_arrive(barrier(shared));
                   mbarrier_init(barrier(shared), 2, at("again"));
                 });
               });
  expect_fault("a store into an mbarrier",
               {"store_shared at write:1: a write to shared byte 0, which is of the mbarrier of "
                "thread 0 in mbarrier_init at init:1"},
               [] {
                 run_warp([](char* shared) {
                   make(shared, {32});
                   store_shared(reinterpret_cast<int*>(shared), 0, at("write"));
                 });
               });
  expect_fault("a misaligned mbarrier", {"mbarrier_init at init:1", "byte 4", "aligned to 8"}, [] {
    run_warp([](char* shared) {
      mbarrier_init(reinterpret_cast<Mbarrier*>(shared + 4), 1, at("init"));
    });
  });
  expect_fault("an mbarrier outside of shared memory", {"outside of shared memory: byte 4096"}, [] {
    run_warp([](char* shared) { mbarrier_init(barrier(shared, 512), 1, at("init")); });
  });
  expect_fault(
      "an mbarrier for nobody", {"mbarrier_init at init:1: an mbarrier for 0 arrivals"},
      [] { run_warp([](char* shared) { mbarrier_init(barrier(shared), 0, at("init")); }); });
  expect_fault("a parity of 2", {"mbarrier_wait at wait:1: parity 2"}, [] {
    run_warp([](char* shared) {
      make(shared, {32});
      mbarrier_wait(barrier(shared), 2, at("wait"));
    });
  });
}

void deadlocks() {
  expect_fault(
      "an arrival that never comes",
      {"deadlock: block (0, 0, 0): warp 0: 32 lanes mbarrier_wait at wait:1",
       "the mbarrier of mbarrier_init at init:1 (shared byte 8) in phase 1, parity 1: 3 of "
       "33 arrivals pending, 0 bytes expected, 32 threads wait, first thread"},
      [] {
        run_warp([](char* shared) {
          make(shared, {1, 33});
          mbarrier_arrive(barrier(shared, 1));
          if (lane_idx() == 0) mbarrier_arrive(barrier(shared, 1));
          mbarrier_wait(barrier(shared, 1), 0);
          if (lane_idx() < 30) mbarrier_arrive(barrier(shared, 1));
          mbarrier_wait(barrier(shared, 1), 1, at("wait"));
        });
      });
  expect_fault("bytes that never come", {"deadlock", "0 of 1 arrivals pending, 48 bytes expected"},
               [] {
                 run_warp([](char* shared) {
                   make(shared, {1});
                   if (lane_idx() == 0) mbarrier_arrive_expect_tx(barrier(shared), 48);
                   mbarrier_wait(barrier(shared), 0, at("wait"));
                 });
               });
}

void named() {
  expect_no_fault("warps that arrive and go on", [] {
    run_block(64, kSharedBytes, [](char* shared) {
      for (int round = 0; round < 5; ++round) {
        if (warp_idx() == 0) {
          store_shared(word(shared, lane_idx()), round);
          arrive_named(1, 64);
          sync_named(2, 64);
        } else {
          sync_named(1, 64);
          check(load_shared(word(shared, lane_idx() ^ 1)) == round, "round ", round);
          arrive_named(2, 64);
        }
      }
    });
  });
  expect_fault("a write after the arrival", {"a race: shared byte", "at write:1"}, [] {
    run_block(64, kSharedBytes, [](char* shared) {
      if (warp_idx() == 0) {
        arrive_named(1, 64);
        store_shared(word(shared, lane_idx()), 1, at("write"));
      } else {
        sync_named(1, 64);
        store_shared(word(shared, lane_idx()), 1, at("write"));
      }
    });
  });
  expect_fault("who arrives has waited for nobody", {"a race: shared byte", "at write:1"}, [] {
    run_block(64, kSharedBytes, [](char* shared) {
      if (warp_idx() == 0) {
        arrive_named(1, 64);
      } else {
        store_shared(word(shared, lane_idx()), 1, at("write"));
        sync_named(1, 64);
      }
      if (warp_idx() == 0) store_shared(word(shared, lane_idx()), 1, at("write"));
    });
  });
  expect_fault(
      "an arrival that nobody completes",
      {"arrive_named at arrive:1: the block ended before all threads came to this barrier"}, [] {
        run_block(64, 128, [](char*) {
          if (warp_idx() == 0) arrive_named(1, 64, at("arrive"));
        });
      });
  expect_fault("barrier 0", {"arrive_named at arrive:1: barrier 0"},
               [] { run_warp([](char*) { arrive_named(0, 32, at("arrive")); }); });
}

}  // namespace

SA_SUITE(emulated_mbarrier) {
  phases();
  missing_order();
  misuse();
  deadlocks();
  named();
}

}  // namespace sink_attention::tests
