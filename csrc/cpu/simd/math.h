// exp2 and tanh on vectors, to about one unit in the last place, with a softmax's limits at
// infinity.
#pragma once

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

template <class Real>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  // x + kRoundingShift has round(x) in the low bits of its mantissa.
  static constexpr float kRoundingShift = 0x1.8p23f;
  static constexpr float kMinExponent = -126.0f;
  static constexpr float kMaxExponent = 127.0f;
};
template <>
struct FloatFormat<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRoundingShift = 0x1.8p52;
  static constexpr double kMinExponent = -1022.0;
  static constexpr double kMaxExponent = 1023.0;
};

// Chebyshev fits, lowest power first; the greatest error beside each. kExp2* fits 2^f on [0, 1].
// kExp2Minus1* fits (2^f - 1) / f on [-0.5, 0.5]. kExp2Fast is the best fit that is exact at 0 and
// 1 and has mean error 0 (a mean error would shift every lse); its greatest error is 3.5e-6.
constexpr float kExp2Fast[] = {1.0f, 0.69303185f, 0.24137874f, 0.052036084f, 0.013553342f};
constexpr float kExp2Float[] = {
    1.0000000025307452f,   0.6931469327588669f,   0.24023045441230567f,   0.05548063019670533f,
    0.009684186310342369f, 0.001239133183441148f, 0.00021865784786598053f};  // 3e-9
constexpr double kExp2Double[] = {1.0,
                                  0.6931471805599453,
                                  0.24022650695910178,
                                  0.05550410866479814,
                                  0.009618129107895819,
                                  0.001333355812830156,
                                  0.00015403531181239552,
                                  1.5252710899536155e-05,
                                  1.3215941410909557e-06,
                                  1.0171914253547674e-07,
                                  7.1111279931838334e-09,
                                  4.119125031775618e-10,
                                  3.6392761310498464e-11};  // 6e-20
constexpr float kExp2Minus1Float[] = {0.6931471880262288f,    0.24022650760568126f,
                                      0.05550357114219078f,   0.009618082557277852f,
                                      0.0013390863364671234f, 0.0001545316294512069f};
constexpr double kExp2Minus1Double[] = {
    0.6931471805599453,     0.24022650695910072,    0.055504108664821625,   0.00961812910762848,
    0.001333355814640647,   0.00015403530393370734, 1.5252733841556773e-05, 1.3215486808705563e-06,
    1.0178057087733941e-07, 7.0548973041554995e-09, 4.4558179083360645e-10, 2.5729324177362305e-11};

template <class Real, int kTerms>
SA_INLINE Vec<Real> polynomial(const Real (&coefficients)[kTerms], Vec<Real> x) {
  Vec<Real> sum = broadcast(coefficients[kTerms - 1]);
  SA_UNROLL
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^n * mantissa for an integer n in the exponent's range; shifted_n = n + kRoundingShift.
template <class Real>
SA_INLINE Vec<Real> scale_exponent(Vec<Real> mantissa, Vec<Real> shifted_n) {
  using Int = typename FloatFormat<Real>::Int;
  return (Vec<Real>)((Vec<Int>)mantissa +
                     ((Vec<Int>)shifted_n << FloatFormat<Real>::kMantissaBits));
}

// 2^x from a polynomial for 2^f on [0, 1]. Below the smallest normal exponent (-inf included) the
// result is 0 or subnormal. NaN gives NaN.
template <class Real, int kTerms>
SA_INLINE Vec<Real> exp2_by(const Real (&coefficients)[kTerms], Vec<Real> x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  // VREDUCE gives x - floor(x), and 0 for +-inf. VSCALEF multiplies by 2^floor(x), with overflow
  // and underflow.
  if constexpr (sizeof(Real) == 4) {
    const Vec<Real> f = (Vec<Real>)_mm512_reduce_ps((__m512)x, 0x09);
    return (Vec<Real>)_mm512_scalef_ps((__m512)polynomial(coefficients, f), (__m512)x);
  } else {
    const Vec<Real> f = (Vec<Real>)_mm512_reduce_pd((__m512d)x, 0x09);
    return (Vec<Real>)_mm512_scalef_pd((__m512d)polynomial(coefficients, f), (__m512d)x);
  }
#else
  using Format = FloatFormat<Real>;
  const Vec<Real> low = broadcast(Format::kMinExponent);
  const Vec<Real> high = broadcast(Format::kMaxExponent);
  Vec<Real> clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  // floor(x), or x - 1 for some integers x: f is in [0, 1].
  const Vec<Real> shifted = (clamped - Real(0.5)) + Format::kRoundingShift;
  const Vec<Real> f = clamped - (shifted - Format::kRoundingShift);
  const Vec<Real> result = scale_exponent<Real>(polynomial(coefficients, f), shifted);
  return x < low ? Vec<Real>{} : result;
#endif
}

SA_INLINE Vec<float> exp2(Vec<float> x) { return exp2_by(kExp2Float, x); }
SA_INLINE Vec<double> exp2(Vec<double> x) { return exp2_by(kExp2Double, x); }

// tanh(x) = e / (e + 2) with e = expm1(2x), so that small x keep their relative precision. With 2x
// log2(e) = n + f, e = 2^n (2^f - 1) + (2^n - 1). The polynomial for 2^f - 1 has no constant term.
template <class Real>
SA_INLINE Vec<Real> tanh(Vec<Real> x) {
  using Format = FloatFormat<Real>;
  constexpr Real kTwoLog2E = Real(2.8853900817779268147);
  constexpr Real kSaturated = Real(60);  // tanh is 1 to the last bit well before 2^60
  Vec<Real> y = x * kTwoLog2E;
  y = y > kSaturated ? broadcast(kSaturated) : y;
  y = y < -kSaturated ? broadcast(-kSaturated) : y;
  const Vec<Real> shifted = y + Format::kRoundingShift;
  const Vec<Real> f = y - (shifted - Format::kRoundingShift);
  Vec<Real> fraction;
  if constexpr (sizeof(Real) == 4) {
    fraction = f * polynomial(kExp2Minus1Float, f);
  } else {
    fraction = f * polynomial(kExp2Minus1Double, f);
  }
  const Vec<Real> power = scale_exponent<Real>(broadcast(Real(1)), shifted);
  const Vec<Real> e = power * fraction + (power - Real(1));
  return e / (e + Real(2));
}

}  // namespace sink_attention::cpu::SA_ISA
