// What accumulators hold while a product into them is under way: a NaN whose low bits number the
// step that started it. Arithmetic keeps a NaN's bits, so what is computed from one shows them too;
// the primitives that numbers leave a thread's registers by refuse it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/step.h"

namespace emulator {

constexpr uint32_t kPoison = 0x7fea5000u;  // quiet; neither a widened bfloat16 nor float16
constexpr uint32_t kPoisonMask = 0x7ffff000u;

inline uint32_t poison_of(uint16_t step) { return kPoison | step; }
inline bool is_poison(uint32_t bits) { return (bits & kPoisonMask) == kPoison; }

[[noreturn, gnu::cold]] void poison_found(uint32_t bits, const Step& step);

inline void refuse_poison(float value, const char* name, Site site) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (is_poison(bits)) poison_found(bits, {name, site});
}

// Vectors of doubles, whose halves may be any word.
template <class T>
struct HoldsDoubles : std::false_type {};
template <template <class> class Vector>
struct HoldsDoubles<Vector<double>> : std::true_type {};

// A value that is stored or goes to another lane. Numbers are stored as floats or in aggregates of
// 4-byte words; two 16-bit elements have been packed, and refused there.
template <class T>
void refuse_poison_in(const T& value, const char* name, Site site) {
  if constexpr (std::is_same_v<T, float> ||
                (std::is_class_v<T> && sizeof(T) % 4 == 0 && !HoldsDoubles<T>::value)) {
    for (size_t i = 0; i < sizeof(T); i += 4) {
      float word;
      memcpy(&word, reinterpret_cast<const char*>(&value) + i, sizeof(word));
      refuse_poison(word, name, site);
    }
  }
}

}  // namespace emulator
