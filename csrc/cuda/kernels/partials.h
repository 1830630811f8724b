// Partial results of a call whose keys are divided into parts: where they lie until they are
// joined (combine.h), and how many parts are worth having. By what the host knows: shapes, and the
// longest sequence that there can be.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/call_shape.h"

namespace sink_attention::cuda {

constexpr int kMaxSplits = 64;
constexpr int64_t kWorkspaceAlignment = 256;

// Most kernels' block of keys: with more parts than blocks some have none, and would take as much
// memory as any other.
constexpr int64_t kSplitKeys = 64;

// What all partial results may take together. On a card of 132 multiprocessors and with head_dim_v
// of 128, all that the backend chooses by itself takes less than 100 MiB.
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

// Keys of a sequence that its rows may see.
inline int64_t most_keys(const CallShape& shape) {
  const int64_t keys = shape.seqlen_k;
  if (shape.window_left < 0) return keys;
  return std::min(keys, shape.window_left + shape.seqlen_q +
                            std::max<int64_t>(shape.window_right, 0) +
                            std::min(shape.num_sink_tokens, keys));
}

// `wanted` parts (at least 1), or as many as there may be keys and memory for.
inline int limit_splits(const CallShape& shape, int64_t wanted) {
  const int64_t blocks = (most_keys(shape) + kSplitKeys - 1) / kSplitKeys;
  const int64_t part_bytes = shape.num_heads_q * shape.total_q * (2 + shape.head_dim_v) *
                             static_cast<int64_t>(sizeof(float));
  const int64_t affordable = kMaxPartialBytes / std::max<int64_t>(part_bytes, 1);
  return static_cast<int>(
      std::clamp<int64_t>(std::min({wanted, blocks, affordable}), 1, kMaxSplits));
}

// [num_splits][num_heads_q][total_q]: the state (maximum and sum, base 2; two floats) and the
// undivided output (head_dim_v floats) of each row, without the sink. Null where nothing is split.
struct Partials {
  float* state;
  float* out;
};

inline int64_t partial_floats(const CallShape& shape, int num_splits, int64_t per_row) {
  return num_splits == 1 ? 0 : num_splits * shape.num_heads_q * shape.total_q * per_row;
}
inline int64_t aligned_bytes(int64_t floats) {
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}
inline int64_t partials_bytes(const CallShape& shape, int num_splits) {
  return aligned_bytes(partial_floats(shape, num_splits, 2)) +
         aligned_bytes(partial_floats(shape, num_splits, shape.head_dim_v));
}

// In a workspace of that size.
inline Partials partials_in(void* workspace, const CallShape& shape, int num_splits) {
  if (num_splits == 1) return {nullptr, nullptr};
  char* base = static_cast<char*>(workspace);
  return {reinterpret_cast<float*>(base),
          reinterpret_cast<float*>(base + aligned_bytes(partial_floats(shape, num_splits, 2)))};
}

// Combine's blocks: a row's parts are joined by a warp, or by a block where they are more than a
// warp has under way at once.
constexpr int kCombineWarps = 4;
constexpr int kSplitsOfAWarp = 8;
inline bool has_block_per_row(int num_splits) { return num_splits > kSplitsOfAWarp; }
inline int64_t combine_tiles(const CallShape& shape, int num_splits) {
  const int tile_rows = has_block_per_row(num_splits) ? 1 : kCombineWarps;
  return (shape.pack_gqa_rows() + tile_rows - 1) / tile_rows;
}

// Throws std::runtime_error where one launch cannot join all rows.
inline void check_combine(const CallShape& shape, int num_splits) {
  if (num_splits == 1) return;
  if (combine_tiles(shape, num_splits) * shape.batch > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  if (shape.num_heads_kv > kMaxGridY) {
    throw std::runtime_error("sink_attention_ext: more kv heads than one launch can take");
  }
}

}  // namespace sink_attention::cuda
