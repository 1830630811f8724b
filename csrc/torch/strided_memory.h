// Which bytes a strided tensor has, and whether two have one in common: exact for every layout.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace sink_attention::binding {

// 0, 1, ..., most times `step` bytes.
struct Term {
  int64_t step;
  int64_t most;
};

// Whether `target` is a sum of one multiple of each term. Steps are positive.
bool is_sum_of(std::vector<Term> terms, int64_t target);

// The elements of a tensor: those of `data`, `item_bytes` each, at all combinations of multiples of
// its dimensions (without those of one element).
struct StridedMemory {
  static constexpr int kMaxDims = 8;

  uintptr_t data;
  int64_t item_bytes;
  std::array<Term, kMaxDims> dims;  // a step may be 0
  int num_dims;
  bool is_empty;
  int64_t last_byte;  // counted from data
};

bool overlap(const StridedMemory& a, const StridedMemory& b);

// Whether two of the elements lie in one place.
bool overlaps_itself(const StridedMemory& memory);

}  // namespace sink_attention::binding
