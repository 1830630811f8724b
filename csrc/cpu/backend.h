// The CPU backend's interface to csrc/torch and the native tests.
#pragma once

#include <string>
#include <vector>

#include "attention/params.h"

namespace sink_attention::cpu {

// The caller's thread pool. run() calls task(arg, i) for every i in [0, num_tasks), in any order,
// at most num_threads at a time, and returns when all are done. A task's exception must reach
// run()'s caller.
struct Executor {
  int num_threads;
  void* context;
  void (*run)(void* context, int num_tasks, void (*task)(void* arg, int task_idx), void* arg);
};

void flash_fwd(const attention::FlashFwdParams& params, const Executor& executor);
void flash_bwd(const attention::FlashBwdParams& params, const Executor& executor);
// The rows of packed results that flash_fwd and flash_bwd leave alone: out = 0 and lse = -inf where
// a row is in no sequence; dq, dk and dv = 0 there and beyond seqused_k. Dense: nothing.
void fill_unused_rows(const attention::FlashFwdParams& params);
void fill_unused_rows(const attention::FlashBwdParams& params);
void reshape_and_cache(const attention::ReshapeAndCacheParams& params, const Executor& executor);
void append_kv(const attention::AppendKvParams& params, const Executor& executor);
void merge_attn_states(const attention::MergeParams& params, const Executor& executor);

// The instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16". The first call chooses
// the best that is available, or the one that the environment variable SINK_ATTENTION_CPU_ISA
// names. Throws std::invalid_argument if that one is not available.
std::string instruction_set();
// The instruction sets that both this binary and this machine have, best last.
std::vector<std::string> available_instruction_sets();
void set_instruction_set(const std::string& name);  // throws std::invalid_argument if not available

}  // namespace sink_attention::cpu
