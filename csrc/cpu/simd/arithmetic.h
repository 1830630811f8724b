// The three ways to multiply: what a packed operand is made of and how a register tile accumulates
// it.
//
// A Unit is one lane of a packed operand: one number, or (Bf16Arithmetic) a pair of bfloat16
// numbers that neighbour each other along the summed dimension, the lower index in the low half.
// One dot() multiplies and adds kPair products a lane.
#pragma once

#include <type_traits>

#include "attention/params.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

using attention::BFloat16;
using attention::DataType;

// float32 products and sums: for float32, float16, float8 and int8, and for bfloat16 where the
// machine has no dot product.
struct FloatArithmetic {
  using Real = float;
  using Unit = float;
  static constexpr int kPair = 1;
  template <class AnyVec>
  static SA_INLINE AnyVec dot(AnyVec a, AnyVec b, AnyVec sum) {
    return a * b + sum;
  }
  static SA_INLINE Vec<Real> weight_exp2(Vec<Real> x) { return exp2(x); }
};

struct DoubleArithmetic {
  using Real = double;
  using Unit = double;
  static constexpr int kPair = 1;
  template <class AnyVec>
  static SA_INLINE AnyVec dot(AnyVec a, AnyVec b, AnyVec sum) {
    return a * b + sum;
  }
  static SA_INLINE Vec<Real> weight_exp2(Vec<Real> x) { return exp2(x); }
};

#if defined(__AVX512BF16__)
// bfloat16 products, float32 sums: 64 operations an instruction against 32.
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
  // The weight is rounded to bfloat16 (2^-9) before it is used, so a polynomial to 4e-6 loses
  // nothing.
  static SA_INLINE Vec<Real> weight_exp2(Vec<Real> x) { return exp2_by(kExp2Fast, x); }
};
#endif

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Geometry of packed operands for an arithmetic.
template <class Arithmetic>
struct Geometry {
  using Real = typename Arithmetic::Real;
  static constexpr int kLanesReal = kLanes<Real>;
  static constexpr int kPanel =
      kTileVecs * kLanesReal;  // columns of a register tile: keys of S, or of head_dim
  static constexpr int kPair = Arithmetic::kPair;
  // Units that a row of `dim` numbers takes.
  static constexpr int64_t units(int64_t dim) { return divide_up(dim, kPair); }
  // Columns of a row-wise operand (and of the accumulator that it multiplies into), rounded up to
  // whole vectors.
  static constexpr int64_t columns(int64_t dim) { return round_up(dim, kLanesReal); }
};

// Two vectors of weights side by side as units of a row: numbers j .. j + kLanes of a row go to
// units (j / kPair) ... `row` may be the memory that the numbers themselves came from, as long as
// it is written front to back.
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
// Numbers of two neighbouring rows, zipped into units: (even[l], odd[l]) in lane l.
SA_INLINE Vec<uint32_t> zip_rows(Vec<float> even, Vec<float> odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (Vec<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

}  // namespace sink_attention::cpu::SA_ISA
