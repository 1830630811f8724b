// Transposes a square of lanes held in registers.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

// One butterfly stage: of a pair of rows that lie kDistance apart, lane l of the first takes lane l
// of the first or lane l - kDistance of the second, as bit kDistance of l says; the second row
// likewise from above.
template <int kDistance, class Row, int... kLane>
SA_INLINE void exchange(Row& low, Row& high, std::integer_sequence<int, kLane...>) {
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
        exchange<kDistance>(rows[row], rows[row + kDistance],
                            std::make_integer_sequence<int, kCount>{});
      }
    }
    transpose_stage<2 * kDistance>(rows);
  }
}

// Rows of as many lanes as there are rows: a Vec, or a StripVec.
template <class Row, int kCount>
SA_INLINE void transpose(Row (&rows)[kCount]) {
  static_assert(sizeof(Row) == kCount * sizeof(rows[0][0]));
  transpose_stage<1>(rows);
}

}  // namespace sink_attention::cpu::SA_ISA
