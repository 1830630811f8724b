#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

namespace internal {
template <class T>
struct Shuffle {
  T value;
  int source;
  T result;
};
}  // namespace internal

template <class T>
SA_DEVICE T shfl(T value, int lane, const char* name = "shfl",
                 emulator::Site site = emulator::here()) {
  emulator::refuse_poison_in(value, name, site);
  internal::Shuffle<T> mine{value, lane % kWarpSize, T{}};
  emulator::collective({name, site}, &mine, [](void* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i) {
      auto* target = static_cast<internal::Shuffle<T>*>(lanes[i]);
      target->result = static_cast<internal::Shuffle<T>*>(lanes[target->source])->value;
    }
  });
  return mine.result;
}

template <class T>
SA_DEVICE T shfl_xor(T value, int mask, emulator::Site site = emulator::here()) {
  return shfl(value, lane_idx() ^ mask, "shfl_xor", site);
}

SA_DEVICE bool any(bool value, emulator::Site site = emulator::here()) {
  bool mine = value;
  emulator::collective({"any", site}, &mine, [](void* const* lanes) {
    bool found = false;
    for (int i = 0; i < kWarpSize; ++i) found |= *static_cast<bool*>(lanes[i]);
    for (int i = 0; i < kWarpSize; ++i) *static_cast<bool*>(lanes[i]) = found;
  });
  return mine;
}

SA_DEVICE int first_lane(bool value, emulator::Site site = emulator::here()) {
  struct Lane {
    bool value;
    int first;
  } mine{value, kWarpSize};
  emulator::collective({"first_lane", site}, &mine, [](void* const* lanes) {
    int first = 0;
    while (first < kWarpSize && !static_cast<Lane*>(lanes[first])->value) ++first;
    for (int i = 0; i < kWarpSize; ++i) static_cast<Lane*>(lanes[i])->first = first;
  });
  return mine.first;
}

SA_DEVICE void sync_warp(emulator::Site site = emulator::here()) {
  emulator::collective({"sync_warp", site}, nullptr,
                       [](void* const*) { emulator::warp_is_ordered(); });
}

}  // namespace sink_attention::primitives
