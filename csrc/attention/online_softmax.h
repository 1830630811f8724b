// Online softmax: a row's running state, and the one place where the sink enters.
//
// The state over the keys so far is (max, sum): the largest logit, and the sum of exp2(logit -
// max). Logits are in base 2: the natural logit times log2 e. The state of a row without a key is
// (-inf, 0).
#pragma once

#include <cmath>

#include "attention/host_device.h"

namespace sink_attention::attention {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <class Real>
struct RowState {
  Real max;
  Real sum;
};

template <class Real>
SA_HOST_DEVICE constexpr Real negative_infinity() {
  return -static_cast<Real>(INFINITY);
}

// exp2(from - to): the factor that rescales a sum from one maximum to another. From -inf (no key)
// it is 0, also to -inf, where the difference would be NaN.
template <class Real>
SA_HOST_DEVICE Real rebase_factor(Real from, Real to) {
  return from == negative_infinity<Real>() ? Real(0)
                                           : (from == to ? Real(1) : std::exp2(from - to));
}

// A finished row: out = (P V) * scale, and lse in natural log.
template <class Real>
struct RowResult {
  Real scale;
  Real lse;
};

// Adds the sink s_aux (natural log; -inf for none) to the denominator and finishes the row. Both
// are taken relative to max(row max, sink), so that a sink far above every logit cannot overflow.
//
//   no visible key    scale 0, lse = s_aux (-inf without a sink)
//   s_aux = +inf      scale 0, lse = +inf
template <class Real>
SA_HOST_DEVICE RowResult<Real> fold_sink(RowState<Real> row, Real s_aux) {
  const Real sink = s_aux * static_cast<Real>(kLog2E);
  if (row.max == negative_infinity<Real>() && row.sum == Real(0)) return {Real(0), s_aux};
  if (sink == static_cast<Real>(INFINITY)) return {row.sum == row.sum ? Real(0) : row.sum, s_aux};
  const bool sink_leads = sink > row.max || sink != sink;  // a NaN sink reaches the result
  const Real max = sink_leads ? sink : row.max;
  const Real factor = rebase_factor(row.max, max);
  const Real denominator = row.sum * factor + rebase_factor(sink, max);
  const Real log_denominator = std::log2(denominator) * static_cast<Real>(kLn2);
  // Where the sink is the maximum, s_aux itself is used: the conversion to base 2 and back rounds,
  // and the backward takes exp(s_aux - lse).
  const Real log_max = sink_leads ? s_aux : max * static_cast<Real>(kLn2);
  return {factor / denominator, log_max + log_denominator};
}

}  // namespace sink_attention::attention
