// Decode: few rows (at most one strip) against keys and values that are used once. Packing would
// cost more than the products, so both products read the cache's rows themselves.
//
// Scores: a square of kLanes keys by kLanes units is transposed in registers and multiplied at
// once. On AVX-512: 16 registers of square, 8 accumulators, one broadcast. Output: a row of V is a
// row of operand B as it lies (bfloat16: two rows zipped by two shuffles). The sums run over the
// same numbers in the same order as in the packed path, so a row's result does not depend on which
// path computed it.
#pragma once

#include "cpu/simd/gemm.h"
#include "cpu/simd/pack.h"

namespace sink_attention::cpu::SA_ISA {

// scores[row][0 .. kLanes) of kLanes keys; missing keys are rows of zeros.
template <class Arithmetic, int kRows>
SA_INLINE void score_square(const typename Arithmetic::Unit* const* keys, int64_t units,
                            const typename Arithmetic::Unit* q, int64_t q_stride,
                            typename Arithmetic::Real* scores, int64_t score_stride) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Unit>;
  Vec<Real> sum[kRows] = {};
  for (int64_t unit = 0; unit < units; unit += kStep) {
    Vec<Unit> square[kStep];
    SA_UNROLL
    for (int lane = 0; lane < kStep; ++lane) square[lane] = load(keys[lane] + unit);
    transpose<Unit>(square);
    SA_UNROLL
    for (int i = 0; i < kStep; ++i) {
      SA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        sum[row] = Arithmetic::dot(broadcast(q[row * q_stride + unit + i]), square[i], sum[row]);
      }
    }
  }
  SA_UNROLL
  for (int row = 0; row < kRows; ++row) store(scores + row * score_stride, sum[row]);
}

// Vectors column .. of B's next row: one row of V, or two of them zipped.
template <class Arithmetic>
SA_INLINE void load_value_units(const typename Arithmetic::Unit* const* values, int64_t column,
                                Vec<typename Arithmetic::Unit> (&units)[kTileVecs]) {
  static_assert(kTileVecs == 2);
  if constexpr (Arithmetic::kPair == 1) {
    units[0] = load(values[0] + column);
    units[1] = load(values[0] + column + kLanes<typename Arithmetic::Unit>);
  } else {
#if defined(__AVX512BF16__)
    zip_unit_vectors(load(values[0] + column / 2), load(values[1] + column / 2), units[0],
                     units[1]);
#endif
  }
}

// out[row][column ..] = out * rescale + weights V over `depth` units of keys, two vectors of
// columns.
template <class Arithmetic, int kRows>
SA_INLINE void accumulate_columns(const typename Arithmetic::Unit* const* values, int64_t depth,
                                  int64_t column, const typename Arithmetic::Unit* weights,
                                  int64_t weight_stride, const typename Arithmetic::Real* rescale,
                                  typename Arithmetic::Real* out, int64_t out_stride) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  Vec<Real> sum[kRows][kTileVecs];
  SA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    SA_UNROLL
    for (int n = 0; n < kTileVecs; ++n) {
      sum[row][n] = load(out + row * out_stride + column + n * kStep) * rescale[row];
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Unit> b[kTileVecs];
    load_value_units<Arithmetic>(values + k * Arithmetic::kPair, column, b);
    SA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec<Unit> a = broadcast(weights[row * weight_stride + k]);
      SA_UNROLL
      for (int n = 0; n < kTileVecs; ++n) sum[row][n] = Arithmetic::dot(a, b[n], sum[row][n]);
    }
  }
  SA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    SA_UNROLL
    for (int n = 0; n < kTileVecs; ++n)
      store(out + row * out_stride + column + n * kStep, sum[row][n]);
  }
}

// The same with the number of rows known at run time.
template <class Arithmetic, int kRows = kTileRows, class... Args>
SA_INLINE void score_square_rows(int rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return score_square_rows<Arithmetic, kRows - 1>(rows, args...);
  }
  score_square<Arithmetic, kRows>(args...);
}
template <class Arithmetic, int kRows = kTileRows, class... Args>
SA_INLINE void accumulate_columns_rows(int rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return accumulate_columns_rows<Arithmetic, kRows - 1>(rows, args...);
  }
  accumulate_columns<Arithmetic, kRows>(args...);
}

// Whether rows of this type can be read in place: they are units, and both head dims are whole
// panels.
template <class Arithmetic>
SA_INLINE bool can_read_in_place(const attention::FlashFwdProblem& problem) {
  constexpr int kWhole = kTileVecs * kLanes<typename Arithmetic::Real>;
  return rows_are_units<Arithmetic>(problem.kv_dtype, problem.head_dim) &&
         rows_are_units<Arithmetic>(problem.kv_dtype, problem.head_dim_v) &&
         problem.head_dim_v % kWhole == 0;
}

}  // namespace sink_attention::cpu::SA_ISA
