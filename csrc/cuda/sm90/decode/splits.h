// Into how many parts Hopper's decode divides the keys.
#pragma once

#include "cuda/kernels/partials.h"
#include "cuda/plan.h"
#include "cuda/sm90/decode/config.h"

namespace sink_attention::cuda::sm90 {

// Fewer keys a split are not worth the merge: two blocks of 16-bit keys, one of 8-bit ones.
constexpr int64_t kMinSplitKeys = 128;

// Blocks that the card runs at once.
inline int64_t slots_of(const CallShape& shape, const Device& device) {
  const bool two =
      shape.pack_gqa_rows() <= kFewRows && std::max(shape.head_dim, shape.head_dim_v) <= 192;
  return std::max<int64_t>(device.num_sms * (two ? 2 : 1), 1);
}

// How long all blocks take, in times that one block would take for all of its keys.
inline double duration(int64_t blocks, int64_t splits, int64_t slots) {
  const int64_t waves = (blocks * splits + slots - 1) / slots;
  return static_cast<double>(waves) / static_cast<double>(splits);
}

// Lengths in device memory are not known here: the longest that there can be counts. A split of a
// shorter sequence has fewer keys, or none and ends at once.
inline int64_t wanted_splits(const CallShape& shape, const Device& device) {
  if (shape.num_splits > 0) return limit_splits(shape, shape.num_splits);
  const int64_t most = limit_splits(shape, most_keys(shape) / kMinSplitKeys);
  const int64_t slots = slots_of(shape, device);
  const int64_t blocks = std::max<int64_t>(shape.batch * shape.num_heads_kv, 1);
  // Where there are few, as many as run at once.
  if (2 * blocks <= slots) return std::min(slots / blocks, most);
  // Else so many that the last wave of blocks is nearly as full as the others: the fewest that are
  // within a tenth of the best.
  double best = duration(blocks, 1, slots);
  for (int64_t splits = 2; splits <= most; ++splits) {
    best = std::min(best, duration(blocks, splits, slots));
  }
  int64_t splits = 1;
  while (duration(blocks, splits, slots) > 1.1 * best) ++splits;
  return splits;
}

// kv heads and splits lie along one dimension of the grid.
inline int choose_splits(const CallShape& shape, const Device& device) {
  const int64_t most = std::max<int64_t>(kMaxGridY / std::max<int64_t>(shape.num_heads_kv, 1), 1);
  return static_cast<int>(std::min(wanted_splits(shape, device), most));
}

}  // namespace sink_attention::cuda::sm90
