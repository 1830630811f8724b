// C (+)= A B on register tiles (BLIS's micro-kernel): A is broadcast, B is loaded, and C has
// kTileRows x kTileVecs accumulators.
//
// For each unit of the summed dimension a register tile reads up to kTileRows broadcasts of A and
// kTileVecs vectors of B. On AVX-512 that is 10 loads for 16 multiply-adds. B is packed in panels
// of kPanel columns, so it is read sequentially.
//
// Sums over many keys or rows are taken in chains, to bound the rounding error. A chain sums
// kChainUnits units from zero, in registers, and is added to C once. Chains end at fixed indices of
// the summed dimension, so a sum has the same bits wherever a call begins or ends. banked_sum.h
// bounds the error of longer sums.
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

// The length of a chain. Adding it to C is one addition in 64; its error is a few units in the last
// place.
constexpr int64_t kChainUnits = 64;

// The number of units from index `unit` of the summed dimension to the end of its chain.
constexpr int64_t rest_of_chain(int64_t unit) { return kChainUnits - unit % kChainUnits; }

template <class Arithmetic>
struct GemmOperands {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  const Unit* a;
  int64_t a_stride;
  const Unit* b;          // the first unit of the panel
  int64_t b_stride;       // units from one row of the panel to the next
  int64_t depth;          // the number of units that are summed
  int64_t rest_of_chain;  // kAdd, kRescale: the greatest length of the first chain
  Real* c;
  int64_t c_stride;
  const Real* row_scale;  // kRescale only
};

// c * factor, rounded. Adding zero keeps the compiler from fusing the product with the addition
// that follows: the bits would then depend on where a chain begins.
template <class Real>
SA_INLINE Vec<Real> rescaled(Vec<Real> c, Real factor) {
  return c * factor + Vec<Real>{};
}

// sum = A B over `depth` units, from zero. Advances a and b past them.
template <class Arithmetic, AOrder kOrder, int kRows, int kVecs>
SA_INLINE void gemm_chain(const GemmOperands<Arithmetic>& op, int64_t depth,
                          const typename Arithmetic::Unit*& a, const typename Arithmetic::Unit*& b,
                          Vec<typename Arithmetic::Real> (&sum)[kRows][kVecs]) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  const int64_t a_stride = op.a_stride;
  const int64_t b_stride = op.b_stride;
  SA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    SA_UNROLL
    for (int n = 0; n < kVecs; ++n) sum[m][n] = Vec<Real>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Unit> b_vec[kVecs];
    SA_UNROLL
    for (int n = 0; n < kVecs; ++n) b_vec[n] = load(b + n * kLanes<Real>);
    SA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Vec<Unit> a_vec = broadcast(kOrder == AOrder::kRowMajor ? a[m * a_stride] : a[m]);
      SA_UNROLL
      for (int n = 0; n < kVecs; ++n) sum[m][n] = Arithmetic::dot(a_vec, b_vec[n], sum[m][n]);
    }
    a += kOrder == AOrder::kRowMajor ? 1 : a_stride;
    b += b_stride;
  }
}

template <class Arithmetic, AOrder kOrder, Accumulate kAccumulate, int kRows, int kVecs>
SA_INLINE void gemm_tile(const GemmOperands<Arithmetic>& op) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  const Unit* a = op.a;
  const Unit* b = op.b;
  Vec<Real> sum[kRows][kVecs];
  const auto c_at = [&](int m, int n) { return op.c + m * op.c_stride + n * kStep; };
  if constexpr (kAccumulate == Accumulate::kNo) {
    gemm_chain<Arithmetic, kOrder>(op, op.depth, a, b, sum);
    SA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      SA_UNROLL
      for (int n = 0; n < kVecs; ++n) store(c_at(m, n), sum[m][n]);
    }
    return;
  }
  if constexpr (kAccumulate == Accumulate::kRescale) {
    SA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      SA_UNROLL
      for (int n = 0; n < kVecs; ++n)
        store(c_at(m, n), rescaled<Real>(load(c_at(m, n)), op.row_scale[m]));
    }
  }
  int64_t chain = op.rest_of_chain;
  for (int64_t left = op.depth; left > 0; left -= chain, chain = kChainUnits) {
    chain = chain < left ? chain : left;
    gemm_chain<Arithmetic, kOrder>(op, chain, a, b, sum);
    SA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      SA_UNROLL
      for (int n = 0; n < kVecs; ++n) store(c_at(m, n), load(c_at(m, n)) + sum[m][n]);
    }
  }
}

// gemm_tile with the number of rows (1 .. kTileRows) and of vectors (1 .. kTileVecs) given at run
// time.
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

// Not inlined: each hot loop is one symbol in a profile.
template <class Arithmetic, AOrder kOrder, Accumulate kAccumulate>
__attribute__((noinline)) void gemm(const GemmOperands<Arithmetic>& op, int rows, int vecs) {
  gemm_rows<Arithmetic, kOrder, kAccumulate>(op, rows, vecs);
}

}  // namespace sink_attention::cpu::SA_ISA
