// Transposes a square of lanes in registers, by butterflies.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

// One butterfly on rows kDistance apart, where B = (lane & kDistance) != 0:
//
//   new low[lane]  = B ? high[lane - kDistance] : low[lane]
//   new high[lane] = B ? high[lane]             : low[lane + kDistance]
template <int kDistance, class Row, int... kLane>
SA_INLINE void butterfly(Row& low, Row& high, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const Row new_low = __builtin_shufflevector(
      low, high, ((kLane & kDistance) ? kCount + kLane - kDistance : kLane)...);
  const Row new_high = __builtin_shufflevector(
      low, high, ((kLane & kDistance) ? kCount + kLane : kLane + kDistance)...);
  low = new_low;
  high = new_high;
}

template <int kDistance, class Row, int kCount>
SA_INLINE void transpose_stage(Row (&rows)[kCount]) {
  if constexpr (kDistance < kCount) {
    SA_UNROLL
    for (int row = 0; row < kCount; ++row) {
      if ((row & kDistance) == 0) {
        butterfly<kDistance>(rows[row], rows[row + kDistance],
                             std::make_integer_sequence<int, kCount>{});
      }
    }
    transpose_stage<2 * kDistance>(rows);
  }
}

// Row is a Vec or a StripVec, with as many lanes as there are rows.
template <class Row, int kCount>
SA_INLINE void transpose(Row (&rows)[kCount]) {
  static_assert(sizeof(Row) == kCount * sizeof(rows[0][0]));
  transpose_stage<1>(rows);
}

}  // namespace sink_attention::cpu::SA_ISA
