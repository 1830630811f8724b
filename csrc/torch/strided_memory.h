// The bytes of a strided tensor, and an exact test for the overlap of two tensors of any layout.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace sink_attention::binding {

// The multiples 0, 1, ..., most of `step` bytes.
struct Term {
  int64_t step;
  int64_t most;
};

// Whether `target` is a sum of one multiple of each term. Steps are positive.
bool is_sum_of(std::vector<Term> terms, int64_t target);

// The elements of a tensor, of item_bytes each, at data + any sum of one multiple of each
// dimension. Dimensions of size 1 are left out.
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

// Whether two elements have the same address.
bool overlaps_itself(const StridedMemory& memory);

}  // namespace sink_attention::binding
