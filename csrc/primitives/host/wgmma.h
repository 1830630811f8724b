#pragma once

#include <string>
#include <type_traits>

#include "emulator/machine.h"

namespace sink_attention::primitives {

// PTX ISA, "Matrix Descriptor Format" of wgmma:
//
//   bits  0 ... 13    start address / 16
//   bits 16 ... 29    leading dimension byte offset / 16
//   bits 32 ... 45    stride dimension byte offset / 16
//   bits 49 ... 51    base offset; 0 where the swizzle pattern starts at a multiple of its size
//   bits 62, 63       swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
SA_DEVICE uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes,
                                     Swizzle swizzle, emulator::Site site = emulator::here()) {
  const auto address = reinterpret_cast<intptr_t>(start) -
                       reinterpret_cast<intptr_t>(emulator::current().block->shared.data());
  const auto field = [&](const char* name, int64_t bytes) {
    if (bytes < 0 || bytes >= 1 << 18 || bytes % 16 != 0) {
      emulator::fault({"matrix_descriptor", site}, std::string(name) + " is " +
                                                       std::to_string(bytes) +
                                                       ", no multiple of 16 in 0 ... 2^18 - 16");
    }
    return static_cast<uint64_t>(bytes / 16);
  };
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return field("the start's address in shared memory", address) |
         field("leading_bytes", leading_bytes) << 16 | field("stride_bytes", stride_bytes) << 32 |
         mode << 62;
}

SA_DEVICE void warpgroup_arrive(emulator::Site site = emulator::here()) {
  emulator::warpgroup_collective({"warpgroup_arrive", site}, nullptr,
                                 [](void* const*) { emulator::warpgroup_products().fence(); });
}
SA_DEVICE void wgmma_commit(emulator::Site site = emulator::here()) {
  emulator::warpgroup_collective({"wgmma_commit", site}, nullptr,
                                 [](void* const*) { emulator::warpgroup_products().commit(); });
}
template <int kPending>
SA_DEVICE void wgmma_wait(emulator::Site site = emulator::here()) {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group takes 0 ... 7");
  emulator::warpgroup_collective({"wgmma_wait", site}, nullptr, [](void* const*) {
    emulator::warpgroup_products().wait(kPending);
  });
}
// Until the wait the registers belong to the product, so this call must come after the wait.
template <int kTilesN>
SA_DEVICE void warpgroup_fence_operand(float (&acc)[kTilesN][4],
                                       emulator::Site site = emulator::here()) {
  for (const auto& tile : acc) {
    for (const float value : tile) emulator::refuse_poison(value, "warpgroup_fence_operand", site);
  }
}

namespace internal {
template <class Element>
constexpr emulator::ElementType element_type() {
  if constexpr (std::is_same_v<Element, attention::BFloat16>) {
    return emulator::ElementType::kBFloat16;
  } else if constexpr (std::is_same_v<Element, attention::Float16>) {
    return emulator::ElementType::kFloat16;
  } else {
    static_assert(std::is_same_v<Element, attention::Float8E4M3>, "an element that wgmma takes");
    return emulator::ElementType::kFloat8E4M3;
  }
}
inline void start_product(void* const* lanes) { emulator::warpgroup_products().start(lanes); }
}  // namespace internal

template <class Element, Major kMajorA, Major kMajorB, int kTilesN>
SA_DEVICE void wgmma_ss(float (&acc)[kTilesN][4], uint64_t a, uint64_t b, bool accumulate,
                        emulator::Site site = emulator::here()) {
  static_assert(kTilesN >= 1 && kTilesN <= 32, "8 to 256 columns");
  static_assert(sizeof(Element) == 2 || (kMajorA == Major::kK && kMajorB == Major::kK),
                "8-bit operands are K-major");
  emulator::ProductOperands mine{internal::element_type<Element>(),
                                 8 * kTilesN,
                                 kMajorA == Major::kMn,
                                 kMajorB == Major::kMn,
                                 accumulate,
                                 a,
                                 b,
                                 nullptr,
                                 &acc[0][0]};
  emulator::warpgroup_collective({"wgmma_ss", site}, &mine, internal::start_product);
}
template <class Element, Major kMajorB, int kTilesN>
SA_DEVICE void wgmma_rs(float (&acc)[kTilesN][4], const uint32_t (&a)[4], uint64_t b,
                        bool accumulate, emulator::Site site = emulator::here()) {
  static_assert(kTilesN >= 1 && kTilesN <= 32, "8 to 256 columns");
  static_assert(sizeof(Element) == 2 || kMajorB == Major::kK, "8-bit operands are K-major");
  emulator::ProductOperands mine{internal::element_type<Element>(),
                                 8 * kTilesN,
                                 false,
                                 kMajorB == Major::kMn,
                                 accumulate,
                                 0,
                                 b,
                                 a,
                                 &acc[0][0]};
  emulator::warpgroup_collective({"wgmma_rs", site}, &mine, internal::start_product);
}

}  // namespace sink_attention::primitives
