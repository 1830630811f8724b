#pragma once

#include <cstring>

#include "emulator/machine.h"

namespace sink_attention::primitives {

template <class T>
SA_DEVICE T load_global(const T* source, emulator::Site site = emulator::here()) {
  emulator::check_global(source, sizeof(T), emulator::Access::kRead, {"load_global", site});
  return *source;
}
template <class T>
SA_DEVICE void store_global(T* destination, T value, emulator::Site site = emulator::here()) {
  emulator::refuse_poison_in(value, "store_global", site);
  emulator::check_global(destination, sizeof(T), emulator::Access::kWrite, {"store_global", site});
  *destination = value;
}
template <class T>
SA_DEVICE T load_shared(const T* source, emulator::Site site = emulator::here()) {
  emulator::read_shared(source, sizeof(T), {"load_shared", site});
  return *source;
}
template <class T>
SA_DEVICE void store_shared(T* destination, T value, emulator::Site site = emulator::here()) {
  emulator::refuse_poison_in(value, "store_shared", site);
  emulator::write_shared(destination, sizeof(T), {"store_shared", site});
  *destination = value;
}

}  // namespace sink_attention::primitives
