// Compensated long sums: the rounding error does not grow with the number of terms.
//
// A sum is taken in pieces of about two thousand terms. At the end of a piece it is banked: total
// += piece, and the rounding error of that addition stays in the piece, exactly (Knuth's two-sum).
// The next terms are added to it. So the error of a sum is that of one piece, however many pieces
// there are. Banking a piece without new terms changes no bit, so pieces that a mask leaves empty
// do not matter.
#pragma once

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

constexpr int64_t kPieceKeys = 2048;  // a piece of a row's sums over keys, counted from key 0
constexpr int64_t kPieceRows = 2048;  // a piece of a key's sums over rows

// The rounding error of sum = total + piece. It is 0 for an infinite total, where inf - inf is NaN.
template <class AnyReal>
SA_INLINE AnyReal remainder_of_sum(AnyReal total, AnyReal piece, AnyReal sum) {
  const AnyReal added = sum - total;
  const AnyReal remainder = (total - (sum - added)) + (piece - added);
  return remainder == remainder ? remainder : AnyReal{};
}

template <class Real>
SA_INLINE void bank(Real& total, Real& piece) {
  const Real sum = total + piece;
  piece = remainder_of_sum(total, piece, sum);
  total = sum;
}

// The same for `count` elements (whole vectors), each first multiplied by its factor.
template <class Real>
SA_INLINE void bank(Real* totals, Real* pieces, int64_t count, Real total_factor = Real(1),
                    Real piece_factor = Real(1)) {
  for (int64_t i = 0; i < count; i += kLanes<Real>) {
    const Vec<Real> total = load(totals + i) * total_factor + Vec<Real>{};
    const Vec<Real> piece = load(pieces + i) * piece_factor + Vec<Real>{};
    const Vec<Real> sum = total + piece;
    store(pieces + i, remainder_of_sum(total, piece, sum));
    store(totals + i, sum);
  }
}

}  // namespace sink_attention::cpu::SA_ISA
