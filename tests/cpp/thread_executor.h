// An Executor that starts new threads for each call.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/backend.h"

namespace sink_attention::tests {

inline cpu::Executor thread_executor(int num_threads) {
  const auto run = [](void* context, int num_tasks, void (*task)(void*, int), void* arg) {
    const int num_threads = static_cast<int>(reinterpret_cast<intptr_t>(context));
    std::atomic<int> next{0};
    const auto work = [&] {
      for (int i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) task(arg, i);
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < std::min(num_threads, num_tasks); ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
  };
  return {num_threads, reinterpret_cast<void*>(static_cast<intptr_t>(num_threads)), run};
}

}  // namespace sink_attention::tests
