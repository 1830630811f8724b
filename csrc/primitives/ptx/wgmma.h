#pragma once

#include <type_traits>

namespace sink_attention::primitives {

// PTX ISA 9.7.15.5.1, the matrix descriptor: addresses and offsets in units of 16 bytes.
SA_DEVICE uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes,
                                     Swizzle swizzle) {
  constexpr uint64_t kModes[] = {0, 3, 2, 1};  // none, 32, 64, 128 bytes
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(start));
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kModes[static_cast<int>(swizzle)] << 62;
}

// PTX ISA 9.7.15.7, wgmma.fence, wgmma.commit_group, wgmma.wait_group.
SA_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
SA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
SA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
template <int kTilesN>
SA_DEVICE void warpgroup_fence_operand(float (&acc)[kTilesN][4]) {
  SA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    SA_UNROLL
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[n][i])::"memory");
  }
}

namespace internal {

template <int kTilesN>
struct Wgmma;

// The assembly names each accumulator register, which a template cannot generate. SA_WGMMA(n,
// acc_ids, o0, ..., o6, accumulators) defines Wgmma<n / 8>: acc_ids are the accumulators' operand
// numbers, o0 ... o6 the operand numbers after them.

// clang-format off
#define SA_ACC(n) "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
#define SA_ACC_2(n) SA_ACC(n), SA_ACC(n + 1)
#define SA_ACC_4(n) SA_ACC_2(n), SA_ACC_2(n + 2)
#define SA_ACC_8(n) SA_ACC_4(n), SA_ACC_4(n + 4)
#define SA_ACC_16(n) SA_ACC_8(n), SA_ACC_8(n + 8)

#define SA_WGMMA_SS(n, shape, types, acc_ids, o0, o1, o2, layouts)                            \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " o2 ", 0;\n"                                             \
  "wgmma.mma_async.sync.aligned.m64n" #n shape types " {" acc_ids "}, " o0 ", " o1            \
  ", p, 1, 1" layouts ";\n}\n"
#define SA_WGMMA_RS(n, shape, types, acc_ids, o0, o1, o2, o3, o4, o5, layout)                 \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " o5 ", 0;\n"                                             \
  "wgmma.mma_async.sync.aligned.m64n" #n shape types " {" acc_ids "}, {" o0 ", " o1 ", " o2   \
  ", " o3 "}, " o4 ", p, 1, 1" layout ";\n}\n"

#define SA_WGMMA(n, acc_ids, o0, o1, o2, o3, o4, o5, o6, ...)                                 \
  template <>                                                                                 \
  struct Wgmma<n / 8> {                                                                       \
    template <class Element, int kMnA, int kMnB>                                              \
    static SA_DEVICE void ss(float (&acc)[n / 8][4], uint64_t a, uint64_t b, int accumulate) {\
      if constexpr (std::is_same_v<Element, attention::BFloat16>) {                           \
        asm volatile(SA_WGMMA_SS(n, "k16.f32", ".bf16.bf16", acc_ids, o0, o1, o2,             \
                                 ", " o3 ", " o4)                                             \
                     : __VA_ARGS__                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(kMnA), "n"(kMnB) : "memory");     \
      } else if constexpr (std::is_same_v<Element, attention::Float16>) {                     \
        asm volatile(SA_WGMMA_SS(n, "k16.f32", ".f16.f16", acc_ids, o0, o1, o2,               \
                                 ", " o3 ", " o4)                                             \
                     : __VA_ARGS__                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(kMnA), "n"(kMnB) : "memory");     \
      } else {                                                                                \
        static_assert(kMnA == 0 && kMnB == 0, "8-bit operands are K-major");                  \
        asm volatile(SA_WGMMA_SS(n, "k32.f32", ".e4m3.e4m3", acc_ids, o0, o1, o2, "")         \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate) : "memory");             \
      }                                                                                       \
    }                                                                                         \
    template <class Element, int kMnB>                                                        \
    static SA_DEVICE void rs(float (&acc)[n / 8][4], const uint32_t (&a)[4], uint64_t b,      \
                             int accumulate) {                                                \
      if constexpr (std::is_same_v<Element, attention::BFloat16>) {                           \
        asm volatile(SA_WGMMA_RS(n, "k16.f32", ".bf16.bf16", acc_ids, o0, o1, o2, o3, o4, o5, \
                                 ", " o6)                                                     \
                     : __VA_ARGS__                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),   \
                       "n"(kMnB) : "memory");                                                 \
      } else if constexpr (std::is_same_v<Element, attention::Float16>) {                     \
        asm volatile(SA_WGMMA_RS(n, "k16.f32", ".f16.f16", acc_ids, o0, o1, o2, o3, o4, o5,   \
                                 ", " o6)                                                     \
                     : __VA_ARGS__                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),   \
                       "n"(kMnB) : "memory");                                                 \
      } else {                                                                                \
        static_assert(kMnB == 0, "8-bit operands are K-major");                               \
        asm volatile(SA_WGMMA_RS(n, "k32.f32", ".e4m3.e4m3", acc_ids, o0, o1, o2, o3, o4, o5, \
                                 "")                                                          \
                     : __VA_ARGS__                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)    \
                     : "memory");                                                             \
      }                                                                                       \
    }                                                                                         \
  };

SA_WGMMA(32,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15",
         "%16", "%17", "%18", "%19", "%20", "%21", "%22",
         SA_ACC_4(0))
SA_WGMMA(64,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31",
         "%32", "%33", "%34", "%35", "%36", "%37", "%38",
         SA_ACC_8(0))
SA_WGMMA(80,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39",
         "%40", "%41", "%42", "%43", "%44", "%45", "%46",
         SA_ACC_8(0), SA_ACC_2(8))
SA_WGMMA(96,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
         "%42, %43, %44, %45, %46, %47",
         "%48", "%49", "%50", "%51", "%52", "%53", "%54",
         SA_ACC_8(0), SA_ACC_4(8))
SA_WGMMA(128,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
         "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
         "%56, %57, %58, %59, %60, %61, %62, %63",
         "%64", "%65", "%66", "%67", "%68", "%69", "%70",
         SA_ACC_16(0))
SA_WGMMA(160,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
         "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
         "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
         "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79",
         "%80", "%81", "%82", "%83", "%84", "%85", "%86",
         SA_ACC_16(0), SA_ACC_4(16))
SA_WGMMA(192,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
         "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
         "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
         "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
         "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95",
         "%96", "%97", "%98", "%99", "%100", "%101", "%102",
         SA_ACC_16(0), SA_ACC_8(16))
SA_WGMMA(256,
         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
         "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
         "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
         "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
         "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
         "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
         "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
         "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
         "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
         "%126, %127",
         "%128", "%129", "%130", "%131", "%132", "%133", "%134",
         SA_ACC_16(0), SA_ACC_16(16))

#undef SA_WGMMA
#undef SA_WGMMA_RS
#undef SA_WGMMA_SS
#undef SA_ACC_16
#undef SA_ACC_8
#undef SA_ACC_4
#undef SA_ACC_2
#undef SA_ACC
// clang-format on

}  // namespace internal

// PTX ISA 9.7.15.5, wgmma.mma_async.
template <class Element, Major kMajorA, Major kMajorB, int kTilesN>
SA_DEVICE void wgmma_ss(float (&acc)[kTilesN][4], uint64_t a, uint64_t b, bool accumulate) {
  internal::Wgmma<kTilesN>::template ss<Element, kMajorA == Major::kMn, kMajorB == Major::kMn>(
      acc, a, b, accumulate);
}
template <class Element, Major kMajorB, int kTilesN>
SA_DEVICE void wgmma_rs(float (&acc)[kTilesN][4], const uint32_t (&a)[4], uint64_t b,
                        bool accumulate) {
  internal::Wgmma<kTilesN>::template rs<Element, kMajorB == Major::kMn>(acc, a, b, accumulate);
}

}  // namespace sink_attention::primitives
