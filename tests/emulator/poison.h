// The contents of accumulators whose product is incomplete: a NaN whose low bits are the id of the
// step that started the product. Arithmetic keeps a NaN's bits, so results computed from it carry
// them too. Every primitive by which a value leaves a thread's registers faults at such a value.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/step.h"

namespace emulator {

constexpr uint32_t kPoison = 0x7fea5000u;  // quiet; no upcast bfloat16 or float16 equals it
constexpr uint32_t kPoisonMask = 0x7ffff000u;

inline uint32_t poison_of(uint16_t step) { return kPoison | step; }
inline bool is_poison(uint32_t bits) { return (bits & kPoisonMask) == kPoison; }

[[noreturn, gnu::cold]] void poison_found(uint32_t bits, const Step& step);

inline void refuse_poison(float value, const char* name, Site site) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (is_poison(bits)) poison_found(bits, {name, site});
}

// A float, or a struct of floats with a member x. Words of other types may hold anything; 16-bit
// elements were checked when they were packed.
template <class T>
concept Floats = std::is_same_v<T, float> || std::is_same_v<decltype(T::x), float>;

// For a value that is stored or shuffled.
template <class T>
void refuse_poison_in(const T& value, const char* name, Site site) {
  if constexpr (Floats<T>) {
    for (size_t i = 0; i < sizeof(T); i += 4) {
      float word;
      memcpy(&word, reinterpret_cast<const char*>(&value) + i, sizeof(word));
      refuse_poison(word, name, site);
    }
  }
}

}  // namespace emulator
