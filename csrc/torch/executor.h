// An Executor on torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "cpu/backend.h"

namespace sink_attention::binding {

// torch's pool runs min(threads, tasks) workers, which take tasks from one counter. Inside another
// parallel region torch runs only the first worker, which then takes every task. torch's C
// interface turns an exception into an error code without its message. So the first exception is
// kept and thrown again here; the remaining tasks are dropped.
inline void run_on_torch_threads(void* context, int num_tasks,
                                 void (*task)(void* arg, int task_idx), void* arg) {
  if (num_tasks <= 0) return;
  const int num_threads = *static_cast<const int*>(context);
  if (num_tasks == 1 || num_threads == 1) {
    for (int i = 0; i < num_tasks; ++i) task(arg, i);
    return;
  }
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, std::min(num_threads, num_tasks), 1, [&](int64_t, int64_t) {
    for (int i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) {
      try {
        task(arg, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(num_tasks);
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

struct TorchExecutor : cpu::Executor {
  TorchExecutor()
      : Executor{static_cast<int>(torch::stable::get_num_threads()), nullptr,
                 run_on_torch_threads} {
    context = &num_threads;
  }
  TorchExecutor(const TorchExecutor&) = delete;  // context points into this object
};

}  // namespace sink_attention::binding
