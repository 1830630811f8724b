// From a score <q, k> to a logit in base 2. The factors are computed in double.
#pragma once

#include "attention/host_device.h"
#include "attention/online_softmax.h"
#include "attention/params.h"

namespace sink_attention::cuda {

enum ScoreForm : int {
  kPlain,    // logit = score * softmax_scale_log2
  kNegated,  // logit = -score * softmax_scale_log2, for a negative softmax_scale
  kSoftcap,  // logit = tanh(score * to_tanh) * softmax_scale_log2
};

template <class Real>
struct ScoreScaleOf {
  Real softmax_scale_log2;  // |softmax_scale| * log2 e; with softcap, softcap * log2 e. Positive
  Real to_tanh;             // softmax_scale / softcap; 0 without softcap
  int form;                 // a ScoreForm

  // The scale for keys that are still to be multiplied with `factor`, an 8-bit cache's scale.
  SA_HOST_DEVICE ScoreScaleOf times(Real factor) const {
    ScoreScaleOf result = *this;
    if (form == kSoftcap) {
      result.to_tanh *= factor;
    } else {
      result.softmax_scale_log2 *= factor < 0 ? -factor : factor;
      if (factor < 0) result.form = form == kPlain ? kNegated : kPlain;
    }
    return result;
  }
};

using ScoreScale = ScoreScaleOf<float>;

// softmax_scale is not 0: every op refuses that.
template <class Real = float>
SA_HOST_DEVICE ScoreScaleOf<Real> score_scale(const attention::FlashFwdParams& params) {
  const double scale = params.softmax_scale;
  if (params.softcap > 0) {
    return {static_cast<Real>(params.softcap * attention::kLog2E),
            static_cast<Real>(scale / params.softcap), kSoftcap};
  }
  return {static_cast<Real>((scale < 0 ? -scale : scale) * attention::kLog2E), Real(0),
          scale < 0 ? kNegated : kPlain};
}

// The exponent of P = exp2(logit - lse) in the backward, at most 0, so that P is at most 1. That
// keeps gradients finite where logits are so large that lse is rounded by 1 or more. NaN passes.
template <class Real>
SA_HOST_DEVICE Real clamp_exponent(Real exponent) {
  return exponent > Real(0) ? Real(0) : exponent;
}

}  // namespace sink_attention::cuda
