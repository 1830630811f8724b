// Transposes a square of lanes held in registers.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

// One butterfly stage: of a pair of rows that lie kDistance apart, lane l of the first takes lane l
// of the first or lane l - kDistance of the second, as bit kDistance of l says; the second row
// likewise from above.
template <int kDistance, class T, int... kLane>
SA_INLINE void exchange(Vec<T>& low, Vec<T>& high, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const Vec<T> new_low = __builtin_shufflevector(
      low, high, ((kLane & kDistance) ? kCount + kLane - kDistance : kLane)...);
  const Vec<T> new_high = __builtin_shufflevector(
      low, high, ((kLane & kDistance) ? kCount + kLane : kLane + kDistance)...);
  low = new_low;
  high = new_high;
}

template <int kDistance, class T>
SA_INLINE void transpose_stage(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kDistance < kLanes<T>) {
    SA_UNROLL
    for (int row = 0; row < kLanes<T>; ++row) {
      if ((row & kDistance) == 0) {
        exchange<kDistance, T>(rows[row], rows[row + kDistance],
                               std::make_integer_sequence<int, kLanes<T>>{});
      }
    }
    transpose_stage<2 * kDistance, T>(rows);
  }
}

template <class T>
SA_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  transpose_stage<1, T>(rows);
}

}  // namespace sink_attention::cpu::SA_ISA
