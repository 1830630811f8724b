// cp.async: which copies are complete after each wait.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

constexpr int kGroups = 4;

// Each thread copies one chunk a group and reads back the chunk of one group after wait<kPending>.
template <int kPending>
void read_after_wait(DeviceArray<uint32_t>& source, int group_to_read) {
  VisibleBuffers buffers({source.readable()});
  run_warp([&](char* shared) {
    const int thread = thread_idx();
    for (int group = 0; group < kGroups; ++group) {
      cp_async_16(shared + (group * 32 + thread) * 16, &source[(group * 32 + thread) * 4], true,
                  at("copy"));
      cp_async_commit();
    }
    cp_async_wait<kPending>();
    const auto* chunk = reinterpret_cast<uint32_t*>(shared + (group_to_read * 32 + thread) * 16);
    for (int i = 0; i < 4; ++i) {
      const uint32_t found = load_shared(chunk + i, at("read"));
      check(found == source[(group_to_read * 32 + thread) * 4 + i], "group ", group_to_read,
            " after wait<", kPending, ">: ", found);
    }
    cp_async_wait<0>();
  });
}

template <int kPending>
void check_wait(DeviceArray<uint32_t>& source) {
  for (int group = 0; group < kGroups; ++group) {
    const bool arrived = group < kGroups - kPending;
    const std::string message = fault_of([&] { read_after_wait<kPending>(source, group); });
    const bool early = message.find("before the copy of") != std::string::npos &&
                       message.find("cp_async_16 at copy:1 was waited for") != std::string::npos;
    check(arrived ? message.empty() : early, "wait<", kPending, ">, group ", group, ": ", message);
  }
}

}  // namespace

SA_SUITE(emulated_cp_async) {
  DeviceArray<uint32_t> source("source", kGroups * 32 * 4);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint32_t>(i * 7 + 1);
  check_wait<0>(source);
  check_wait<1>(source);
  check_wait<2>(source);
  check_wait<3>(source);
  check_wait<4>(source);

  expect_no_fault("zero fill reads nothing", [] {
    VisibleBuffers none({});
    run_warp([](char* shared) {
      char* chunk = shared + 16 * thread_idx();
      store_shared(reinterpret_cast<uint32_t*>(chunk), 5u);
      cp_async_16(chunk, nullptr, false);
      cp_async_commit();
      cp_async_wait<0>();
      const Bytes16 found = load_shared(reinterpret_cast<const Bytes16*>(chunk));
      for (const uint32_t word : found.word) check(word == 0, "zero fill: ", word);
    });
  });

  expect_no_fault("four bytes a lane, every other lane's zeros", [&] {
    VisibleBuffers buffers({source.readable()});
    run_warp([&](char* shared) {
      const int thread = thread_idx();
      cp_async_4(shared + 4 * thread, &source[thread], thread % 2 == 0);
      cp_async_commit();
      cp_async_wait<0>();
      sync_warp();
      const int other = 31 - thread;
      check(load_shared(reinterpret_cast<const uint32_t*>(shared + 4 * other)) ==
                (other % 2 == 0 ? source[other] : 0u),
            "four bytes of lane ", other);
    });
  });

  // A group without copies counts as one: wait<1> leaves it under way, not the one before it.
  expect_no_fault("an empty group", [&] {
    VisibleBuffers buffers({source.readable()});
    run_warp([&](char* shared) {
      char* chunk = shared + 16 * thread_idx();
      cp_async_16(chunk, &source[4 * thread_idx()], true);
      cp_async_commit();
      cp_async_commit();
      cp_async_wait<1>();
      check(load_shared(reinterpret_cast<const uint32_t*>(chunk)) == source[4 * thread_idx()],
            "the group before an empty one");
    });
  });

  expect_no_fault("others read after a barrier", [&] {
    VisibleBuffers buffers({source.readable()});
    run_block(64, 1024, [&](char* shared) {
      cp_async_16(shared + 16 * thread_idx(), &source[4 * thread_idx()], true);
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
      const int other = 63 - thread_idx();
      check(
          load_shared(reinterpret_cast<const uint32_t*>(shared + 16 * other)) == source[4 * other],
          "another thread's copy");
    });
  });
}

}  // namespace sink_attention::tests
