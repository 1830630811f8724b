// Merging partial results, rows in equal pieces over the threads, and writing a KV cache.
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"

namespace sink_attention::cpu {

void merge_attn_states(const attention::MergeParams& params, const Executor& executor) {
  const InstructionSet& set = current_instruction_set();
  const Kernels& kernels =
      params.dtype == attention::DataType::kFloat64 ? *set.float64 : *set.float32;
  constexpr int64_t kRowsPerJob = 256;
  const int64_t rows = params.batch * params.seqlen * params.num_heads;
  parallel_jobs(executor, (rows + kRowsPerJob - 1) / kRowsPerJob, 0, [&](int64_t job, char*) {
    kernels.merge_rows(params, job * kRowsPerJob, std::min(rows, (job + 1) * kRowsPerJob));
  });
}

// One job a kv head: tokens that share a slot then never race.
void reshape_and_cache(const attention::ReshapeAndCacheParams& params, const Executor& executor) {
  parallel_jobs(executor, params.num_heads_kv, 0, [&](int64_t head_idx, char*) {
    current_instruction_set().float32->cache_head(params, head_idx);
  });
}

}  // namespace sink_attention::cpu
