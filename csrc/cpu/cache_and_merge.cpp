// Merging partial results, rows in equal pieces over the threads, and writing a KV cache.
#include <numeric>

#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "cpu/unused_rows.h"

namespace sink_attention::cpu {

using attention::AppendKvParams;
using attention::KvWriteParams;
using attention::Range;

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

namespace {

// A write of fewer elements than this stays on one thread: starting others takes longer.
constexpr int64_t kElementsPerPart = 64 * 1024;

// Parts of the slots for the threads to take, several each, since slots are dealt out unevenly.
int part_bits_of(const KvWriteParams& params, int num_threads) {
  const int64_t elements =
      params.num_tokens * params.num_heads_kv * (params.head_dim + params.head_dim_v);
  const int64_t most = std::min<int64_t>(elements / kElementsPerPart, int64_t{4} * num_threads);
  int bits = 0;
  while (num_threads > 1 && int64_t{2} << bits <= most) ++bits;
  return bits;
}

void write_tokens(const KvWriteParams& params, CacheTokens tokens, const Executor& executor) {
  tokens.part_bits = part_bits_of(params, executor.num_threads);
  const auto write_cache = current_instruction_set().float32->write_cache;
  parallel_jobs(executor, int64_t{1} << tokens.part_bits, 0,
                [&](int64_t part, char*) { write_cache(params, tokens, part); });
}

// The rows of k and v that sequence batch_idx has.
Range new_rows(const AppendKvParams& params, int64_t batch_idx) {
  if (params.cu_seqlens_q == nullptr) {
    return {batch_idx * params.seqlen_new, (batch_idx + 1) * params.seqlen_new};
  }
  return packed_rows(params.cu_seqlens_q, batch_idx, params.num_tokens);
}

// Finds the slots of a sequence's new tokens, and sets its length.
void append_to_sequence(const AppendKvParams& params, int64_t batch_idx, int64_t* slots) {
  const Range rows = new_rows(params, batch_idx);
  const int64_t capacity = params.max_pages_per_seq * params.page_size;
  const int64_t before = params.cache_seqlens[batch_idx];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t position = before + row - rows.begin;
    if (position < 0 || position >= capacity) continue;
    const int64_t page =
        params.block_table == nullptr
            ? batch_idx
            : params
                  .block_table[batch_idx * params.block_table_stride + position / params.page_size];
    if (page < 0 || page >= params.num_pages) continue;
    slots[row] = page * params.page_size + position % params.page_size;
  }
  params.seqused_k[batch_idx] = static_cast<int32_t>(std::clamp<int64_t>(
      before + rows.end - rows.begin, 0, std::min<int64_t>(capacity, INT32_MAX)));
}

}  // namespace

void reshape_and_cache(const attention::ReshapeAndCacheParams& params, const Executor& executor) {
  CacheTokens tokens{};
  tokens.slots = params.slot_mapping;
  tokens.tokens_per_row = params.num_tokens;
  write_tokens(params, tokens, executor);
}

void append_kv(const AppendKvParams& params, const Executor& executor) {
  const KeptBuffer<Use::kPacked> memory(params.num_tokens * static_cast<int64_t>(sizeof(int64_t)));
  int64_t* slots = reinterpret_cast<int64_t*>(memory.data());
  std::fill_n(slots, params.num_tokens, int64_t{-1});
  for (int64_t b = 0; b < params.batch; ++b) append_to_sequence(params, b, slots);
  if (params.page_table != nullptr) {
    std::iota(params.page_table, params.page_table + params.batch, 0);
  }
  CacheTokens tokens{};
  tokens.slots = slots;
  const bool is_packed = params.cu_seqlens_q != nullptr;
  tokens.tokens_per_row = is_packed ? params.num_tokens : params.seqlen_new;
  tokens.k_stride_batch = is_packed ? 0 : params.k_stride_batch;
  tokens.v_stride_batch = is_packed ? 0 : params.v_stride_batch;
  write_tokens(params, tokens, executor);
  if (params.out != nullptr) fill_unused_rows(params);
}

}  // namespace sink_attention::cpu
