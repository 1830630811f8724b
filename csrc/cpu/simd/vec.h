// One vector register of the instruction set that this file is compiled for.
//
// This folder is compiled once per instruction set, each time in another namespace SA_ISA (a macro
// that kernels_<isa>.cpp sets). Vec is GCC's and Clang's vector extension: the compiler's flags
// turn +, *, comparisons and shuffles into AVX-512, AVX2, SSE2 or NEON. Intrinsics appear only
// where an instruction has no operator (bfloat16 dot product, conversions, exponent scaling), each
// with a portable version beside it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention/numeric.h"

#ifndef SA_ISA
#error "include this only from a kernels_<isa>.cpp, which defines SA_ISA"
#endif

#define SA_INLINE inline __attribute__((always_inline))
#define SA_UNROLL _Pragma("GCC unroll 16")

namespace sink_attention::cpu::SA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// 8 x 2 accumulators, 2 vectors of B, 1 broadcast of A: 19 of 32 registers.
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
// 4 x 2 accumulators, 2 vectors of B, 1 broadcast of A: 11 of 16 registers.
constexpr int kTileRows = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 2;  // vectors a row of a register tile

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// One lane for each row of a strip (in_place.h): half a register or a whole one. Types that would
// need two registers have none.
template <class T>
constexpr bool kHasStripVec = kTileRows * sizeof(T) <= kVectorBytes;
template <class T>
struct StripVecOf {
  typedef T type __attribute__((vector_size(kTileRows * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(kTileRows * sizeof(T)), aligned(1), may_alias));
};
template <class T>
using StripVec = typename StripVecOf<T>::type;

template <class T>
SA_INLINE Vec<T> load(const T* source) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(source);
}

template <class T>
SA_INLINE void store(T* destination, Vec<T> value) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(destination) = value;
}

template <class T>
SA_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // GCC and Clang both compile this form to one broadcast
}

template <class T>
SA_INLINE StripVec<T> load_strip(const T* source) {
  return *reinterpret_cast<const typename StripVecOf<T>::unaligned*>(source);
}

template <class T>
SA_INLINE void store_strip(T* destination, StripVec<T> value) {
  *reinterpret_cast<typename StripVecOf<T>::unaligned*>(destination) = value;
}

template <class T>
SA_INLINE StripVec<T> broadcast_strip(T value) {
  return value - StripVec<T>{};
}

SA_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
SA_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of the two; b where either is NaN.
SA_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
SA_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
  return a < b ? a : b;
#endif
}

// Sum and maximum over the lanes, by halving the vector, so the order of the sum is fixed.
template <class T>
SA_INLINE T reduce_add(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  SA_UNROLL
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    SA_UNROLL
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class T>
SA_INLINE T reduce_max(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  SA_UNROLL
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    SA_UNROLL
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
    }
  }
  return lanes[0];
}

#if defined(__AVX512F__)
template <>
SA_INLINE float reduce_add<float>(Vec<float> value) {
  return _mm512_reduce_add_ps((__m512)value);
}
template <>
SA_INLINE float reduce_max<float>(Vec<float> value) {
  return _mm512_reduce_max_ps((__m512)value);
}
#endif

}  // namespace sink_attention::cpu::SA_ISA
