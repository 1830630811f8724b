// Limits of the number of splits of a split-KV forward. They depend only on what the host knows:
// shapes, and an upper bound of the sequence lengths.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/combine.h"

namespace sink_attention::cuda {

// Keys per block in most kernels. With more splits than blocks some splits would be empty, and take
// as much memory as others.
constexpr int64_t kSplitKeys = 64;

// Most bytes of partial results. On a card of 132 SMs with head_dim_v 128, the splits that the
// backend chooses itself take less than 100 MiB.
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

// An upper bound of the keys that are visible to the rows of a sequence.
inline int64_t most_keys(const attention::FlashFwdParams& params) {
  const int64_t keys = params.seqlen_k;
  if (params.window_left < 0) return keys;
  return std::min(keys, params.window_left + params.seqlen_q +
                            std::max<int64_t>(params.window_right, 0) +
                            std::min(params.num_sink_tokens, keys));
}

// `wanted` splits, clamped to [1, kMaxSplits] and to what keys and memory allow.
inline int limit_splits(const attention::FlashFwdParams& params, int64_t wanted) {
  const int64_t blocks = (most_keys(params) + kSplitKeys - 1) / kSplitKeys;
  const int64_t part_bytes = params.num_heads_q * params.total_q * (2 + params.head_dim_v) *
                             static_cast<int64_t>(sizeof(float));
  const int64_t affordable = kMaxPartialBytes / std::max<int64_t>(part_bytes, 1);
  return static_cast<int>(
      std::clamp<int64_t>(std::min({wanted, blocks, affordable}), 1, kMaxSplits));
}

}  // namespace sink_attention::cuda
