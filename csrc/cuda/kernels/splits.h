// How many parts of a row's keys are worth having. By what the host knows: shapes, and the longest
// sequence that there can be.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/combine.h"

namespace sink_attention::cuda {

// Most kernels' block of keys: with more parts than blocks some have none, and would take as much
// memory as any other.
constexpr int64_t kSplitKeys = 64;

// What all partial results may take together. On a card of 132 multiprocessors and with head_dim_v
// of 128, all that the backend chooses by itself takes less than 100 MiB.
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

// Keys of a sequence that its rows may see.
inline int64_t most_keys(const attention::FlashFwdParams& params) {
  const int64_t keys = params.seqlen_k;
  if (params.window_left < 0) return keys;
  return std::min(keys, params.window_left + params.seqlen_q +
                            std::max<int64_t>(params.window_right, 0) +
                            std::min(params.num_sink_tokens, keys));
}

// `wanted` parts (at least 1), or as many as there may be keys and memory for.
inline int limit_splits(const attention::FlashFwdParams& params, int64_t wanted) {
  const int64_t blocks = (most_keys(params) + kSplitKeys - 1) / kSplitKeys;
  const int64_t part_bytes = params.num_heads_q * params.total_q * (2 + params.head_dim_v) *
                             static_cast<int64_t>(sizeof(float));
  const int64_t affordable = kMaxPartialBytes / std::max<int64_t>(part_bytes, 1);
  return static_cast<int>(
      std::clamp<int64_t>(std::min({wanted, blocks, affordable}), 1, kMaxSplits));
}

}  // namespace sink_attention::cuda
