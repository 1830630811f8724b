// The three arithmetics: the type of packed operands, and the multiply-add of a register tile.
//
// A Unit is one lane of a packed operand. It is one element, or (Bf16Arithmetic) two bfloat16
// elements that are neighbours along the summed dimension, the lower index in the low half. One
// dot() adds kPair products in each lane.
#pragma once

#include <type_traits>

#include "attention/params.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

using attention::BFloat16;
using attention::DataType;

// float32 products and sums: for float32, float16, float8 and int8, and for bfloat16 without a
// bfloat16 dot product.
struct FloatArithmetic {
  using Real = float;
  using Unit = float;
  static constexpr int kPair = 1;
  template <class AnyVec>
  static SA_INLINE AnyVec dot(AnyVec a, AnyVec b, AnyVec sum) {
    return a * b + sum;
  }
  static SA_INLINE Vec<Real> softmax_exp2(Vec<Real> x) { return exp2(x); }
};

struct DoubleArithmetic {
  using Real = double;
  using Unit = double;
  static constexpr int kPair = 1;
  template <class AnyVec>
  static SA_INLINE AnyVec dot(AnyVec a, AnyVec b, AnyVec sum) {
    return a * b + sum;
  }
  static SA_INLINE Vec<Real> softmax_exp2(Vec<Real> x) { return exp2(x); }
};

#if defined(__AVX512BF16__)
// bfloat16 products, float32 sums: 64 operations per instruction instead of 32.
struct Bf16Arithmetic {
  using Real = float;
  using Unit = uint32_t;
  static constexpr int kPair = 2;
  static SA_INLINE Vec<Real> dot(Vec<Unit> a, Vec<Unit> b, Vec<Real> sum) {
    return (Vec<Real>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static SA_INLINE StripVec<Real> dot(StripVec<Unit> a, StripVec<Unit> b, StripVec<Real> sum) {
    return (StripVec<Real>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
  }
  // P is rounded to bfloat16 (relative 2^-9), so a polynomial with error 4e-6 loses nothing.
  static SA_INLINE Vec<Real> softmax_exp2(Vec<Real> x) { return exp2_by(kExp2Fast, x); }
};
#endif

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The sizes of packed operands for an arithmetic.
template <class Arithmetic>
struct Geometry {
  using Real = typename Arithmetic::Real;
  static constexpr int kLanesReal = kLanes<Real>;
  // Columns of a register tile: keys of S, or head_dim columns of O.
  static constexpr int kPanel = kTileVecs * kLanesReal;
  static constexpr int kPair = Arithmetic::kPair;
  // Units of a row of `dim` elements.
  static constexpr int64_t units(int64_t dim) { return divide_up(dim, kPair); }
  // Columns of a row-wise operand, and of its accumulator: rounded up to whole vectors.
  static constexpr int64_t columns(int64_t dim) { return round_up(dim, kLanesReal); }
};

// Stores elements [j, j + kLanes) of a row of P or dS as units, from unit j / kPair on. `row` may
// be the memory of the elements themselves, if it is written front to back.
template <class Arithmetic>
SA_INLINE void store_row_units(typename Arithmetic::Unit* row, int64_t j,
                               Vec<typename Arithmetic::Real> value) {
  if constexpr (Arithmetic::kPair == 1) {
    store(row + j, value);
  } else {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
    memcpy(reinterpret_cast<BFloat16*>(row) + j, &narrow, sizeof(narrow));
#endif
  }
}

#if defined(__AVX512BF16__)
// Zips two neighbouring rows into units: lane l is (even[l], odd[l]).
SA_INLINE Vec<uint32_t> zip_rows(Vec<float> even, Vec<float> odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (Vec<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

}  // namespace sink_attention::cpu::SA_ISA
