// C (+)= A B on register tiles: rows of A broadcast, vectors of B loaded, kTileRows x kTileVecs
// accumulators.
//
// A tile reads, for each unit of the summed dimension, `rows` broadcasts of A and up to kTileVecs
// vectors of B, and does rows * kTileVecs multiply-adds: on AVX-512, 10 loads to 16 multiply-adds.
// B comes in panels kPanel columns wide whose rows follow each other in memory, so its stream is
// sequential.
#pragma once

#include "cpu/simd/arithmetic.h"

namespace sink_attention::cpu::SA_ISA {

enum class AOrder {
  kRowMajor,  // A(m, k) at a[m * stride + k]
  kColMajor,  // A(m, k) at a[k * stride + m]
};

enum class Accumulate {
  kNo,       // C = A B
  kAdd,      // C = C + A B
  kRescale,  // C = C * row_scale + A B
};

template <class Arithmetic>
struct GemmOperands {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  const Unit* a;
  int64_t a_stride;
  const Unit* b;     // the panel's first unit that is summed
  int64_t b_stride;  // units from one row of the panel to the next
  int64_t depth;     // units summed
  Real* c;
  int64_t c_stride;
  const Real* row_scale;  // kRescale only
};

template <class Arithmetic, AOrder kOrder, Accumulate kAccumulate, int kRows, int kVecs>
SA_INLINE void gemm_tile(const GemmOperands<Arithmetic>& op) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  Vec<Real> sum[kRows][kVecs];
  SA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    SA_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      if constexpr (kAccumulate == Accumulate::kNo) {
        sum[m][n] = Vec<Real>{};
      } else if constexpr (kAccumulate == Accumulate::kAdd) {
        sum[m][n] = load(op.c + m * op.c_stride + n * kStep);
      } else {
        sum[m][n] = load(op.c + m * op.c_stride + n * kStep) * op.row_scale[m];
      }
    }
  }
  const Unit* a = op.a;
  const Unit* b = op.b;
  const int64_t a_stride = op.a_stride;
  const int64_t b_stride = op.b_stride;
  for (int64_t k = 0; k < op.depth; ++k) {
    Vec<Unit> b_vec[kVecs];
    SA_UNROLL
    for (int n = 0; n < kVecs; ++n) b_vec[n] = load(b + n * kStep);
    SA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Vec<Unit> a_vec = broadcast(kOrder == AOrder::kRowMajor ? a[m * a_stride] : a[m]);
      SA_UNROLL
      for (int n = 0; n < kVecs; ++n) sum[m][n] = Arithmetic::dot(a_vec, b_vec[n], sum[m][n]);
    }
    a += kOrder == AOrder::kRowMajor ? 1 : a_stride;
    b += b_stride;
  }
  SA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    SA_UNROLL
    for (int n = 0; n < kVecs; ++n) store(op.c + m * op.c_stride + n * kStep, sum[m][n]);
  }
}

// The same with the number of rows (1 .. kTileRows) and of vectors (1 .. kTileVecs) known only at
// run time.
template <class Arithmetic, AOrder kOrder, Accumulate kAccumulate, int kRows = kTileRows>
SA_INLINE void gemm_rows(const GemmOperands<Arithmetic>& op, int rows, int vecs) {
  static_assert(kTileVecs == 2);
  if constexpr (kRows > 1) {
    if (rows < kRows) return gemm_rows<Arithmetic, kOrder, kAccumulate, kRows - 1>(op, rows, vecs);
  }
  if (vecs == kTileVecs) {
    gemm_tile<Arithmetic, kOrder, kAccumulate, kRows, kTileVecs>(op);
  } else {
    gemm_tile<Arithmetic, kOrder, kAccumulate, kRows, 1>(op);
  }
}

// Not inlined: these are the hot loops, one symbol each in a profile.
template <class Arithmetic, AOrder kOrder, Accumulate kAccumulate>
__attribute__((noinline)) void gemm(const GemmOperands<Arithmetic>& op, int rows, int vecs) {
  gemm_rows<Arithmetic, kOrder, kAccumulate>(op, rows, vecs);
}

}  // namespace sink_attention::cpu::SA_ISA
