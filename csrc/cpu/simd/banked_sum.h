// Sums so long that their error would grow with their length: collected in pieces of about two
// thousand terms, each of which is banked.
//
// total += piece, and what the addition rounds off stays in the piece, exactly (Knuth's two-sum),
// where the next terms are added to it. So the error of a sum is that of its pieces, however many
// there are. Banking once more, without new terms, changes nothing: a sum has the same bits whether
// or not it was banked where it has no term.
#pragma once

#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

constexpr int64_t kPieceKeys = 2048;  // of a row's sums over keys, counted from key 0
constexpr int64_t kPieceRows = 2048;  // of a key's sums over rows

// An infinite total has no remainder; inf - inf must not make a NaN of it.
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

// The same for `count` numbers, whole vectors, after the factors have been multiplied in.
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
