// How wide a row's vectors can be, and how many rows a thread block takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace sink_attention::cuda {

// The largest power of two up to 16 that divides all of them: pointers, strides and sizes in bytes.
inline int common_alignment(std::initializer_list<int64_t> values) {
  int64_t bits = 16;
  for (const int64_t value : values) bits |= value;
  return static_cast<int>(bits & -bits);
}

// Few rows: a block each. Many: blocks enough to fill a device.
inline int rows_per_block(int64_t num_rows, int64_t most) {
  constexpr int64_t kEnoughBlocks = 256;
  return static_cast<int>(std::clamp<int64_t>(num_rows / kEnoughBlocks, 1, most));
}

inline int blocks_of(int64_t num_rows, int64_t per_block) {
  return static_cast<int>((num_rows + per_block - 1) / per_block);
}

}  // namespace sink_attention::cuda
