// Which bytes a strided tensor has, and whether two have one in common: exact for every layout.
#pragma once

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
// `dims` (without those of one element). No element where `is_empty`.
struct StridedMemory {
  uintptr_t data;
  int64_t item_bytes;
  std::vector<Term> dims;  // a step may be 0
  bool is_empty;
};

bool overlap(const StridedMemory& a, const StridedMemory& b);

// Whether two of the elements lie in one place.
bool overlaps_itself(const StridedMemory& memory);

}  // namespace sink_attention::binding
