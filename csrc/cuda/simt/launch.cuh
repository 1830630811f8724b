// From a problem's head dims to the kernel made for them, and its grid.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "attention/params.h"
#include "primitives/launch.h"

namespace sink_attention::cuda::simt {

// Calls start(std::integral_constant<int, n>) with the smallest n of 64, 128, 256 that both head
// dims fit in.
template <class Start>
void with_head_dim(const attention::FlashFwdParams& params, const Start& start) {
  const int64_t larger = params.head_dim > params.head_dim_v ? params.head_dim : params.head_dim_v;
  if (larger <= 64) return start(std::integral_constant<int, 64>{});
  if (larger <= 128) return start(std::integral_constant<int, 128>{});
  if (larger <= 256) return start(std::integral_constant<int, 256>{});
  throw std::runtime_error("float32 or float64 attention: head_dim must be at most 256");
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block for each tile of each kv head of each sequence; tiles are counted of the longest one.
inline primitives::Index3 grid_of(const attention::FlashFwdParams& params, int64_t num_tiles) {
  const int64_t blocks = num_tiles * params.num_heads_kv * params.batch;
  if (blocks > INT32_MAX)
    throw std::runtime_error(
        "float32 or float64 attention: more rows or keys than one launch can take");
  return {static_cast<int>(blocks), 1, 1};
}

}  // namespace sink_attention::cuda::simt
