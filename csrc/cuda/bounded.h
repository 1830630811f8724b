// A problem whose rows and keys kernels can count in ints.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "attention/problem.h"

namespace sink_attention::cuda {

// Of rows of a kv head and of keys: an int has room for a tile beyond the last one.
constexpr int64_t kMaxCount = INT32_MAX - 1023;
constexpr int64_t kMaxGridY = 65535;  // thread blocks along a grid's second dimension

// Throws std::runtime_error where there are more. Of a cache the keys that there can be are bounded
// instead: a block table may have more entries than any sequence needs. Lengths in device memory
// are bounded by these where they are read (attention/seqlen_info.h).
inline attention::FlashFwdProblem bounded(attention::FlashFwdProblem problem) {
  const int64_t group =
      problem.num_heads_q / std::max<int64_t>(problem.num_heads_kv, 1);  // q may have no heads
  const int64_t rows = problem.cu_seqlens_q != nullptr ? problem.total_q : problem.seqlen_q;
  const int64_t keys = problem.cu_seqlens_k != nullptr ? problem.total_k : problem.seqlen_k;
  const bool is_paged = problem.block_table != nullptr;
  if (rows * group > kMaxCount || (!is_paged && keys > kMaxCount)) {
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
  }
  if (is_paged) {
    problem.seqlen_k = problem.num_pages == 0 ? 0 : std::min(problem.seqlen_k, kMaxCount);
    problem.num_pages = std::min<int64_t>(problem.num_pages, INT32_MAX);
  }
  return problem;
}

}  // namespace sink_attention::cuda
