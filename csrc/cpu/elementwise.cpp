// Merging partial results, rows in equal pieces over the threads, and writing a KV cache.
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"

namespace sink_attention::cpu {

void merge_attn_states(const attention::MergeProblem& problem, const Executor& executor) {
  const InstructionSet& set = current_instruction_set();
  const Kernels& kernels =
      problem.dtype == attention::DataType::kFloat64 ? *set.float64 : *set.float32;
  constexpr int64_t kRowsPerJob = 256;
  const int64_t rows = problem.batch * problem.seqlen * problem.num_heads;
  parallel_jobs(executor, (rows + kRowsPerJob - 1) / kRowsPerJob, 0, [&](int64_t job, char*) {
    kernels.merge_rows(problem, job * kRowsPerJob, std::min(rows, (job + 1) * kRowsPerJob));
  });
}

// One job a kv head: tokens that share a slot then never race.
void reshape_and_cache(const attention::ReshapeAndCacheProblem& problem, const Executor& executor) {
  parallel_jobs(executor, problem.num_heads_kv, 0, [&](int64_t head_idx, char*) {
    current_instruction_set().float32->cache_head(problem, head_idx);
  });
}

}  // namespace sink_attention::cpu
