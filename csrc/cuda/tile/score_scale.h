// How a score becomes a logit in base 2. Computed on the host: it takes doubles.
#pragma once

#include "attention/host_device.h"
#include "attention/online_softmax.h"
#include "attention/problem.h"

namespace sink_attention::cuda {

// logit = score * to_log2, after cap * tanh(score * to_tanh) where there is a softcap (to_log2 is
// then cap * log2 e), or of the score's negative where the scale is negative.
struct ScoreScale {
  float to_log2;  // > 0
  float to_tanh;
  bool capped;
  bool negated;

  // The same for keys that are yet to be multiplied with a factor (a float8 cache's scale).
  SA_HOST_DEVICE ScoreScale times(float factor) const {
    ScoreScale result = *this;
    if (capped) {
      result.to_tanh *= factor;
    } else {
      result.to_log2 *= factor < 0 ? -factor : factor;
      result.negated = negated != (factor < 0);
    }
    return result;
  }
};

inline ScoreScale score_scale(const attention::FlashFwdProblem& problem) {
  // A scale of 0 would turn a hidden score into 0 * inf; one this small has the same exponentials.
  const double scale = problem.softmax_scale == 0 ? 1e-30 : problem.softmax_scale;
  ScoreScale result{};
  result.capped = problem.softcap > 0;
  result.negated = scale < 0 && !result.capped;
  result.to_tanh = result.capped ? static_cast<float>(scale / problem.softcap) : 0.0f;
  result.to_log2 = static_cast<float>(
      (result.capped ? problem.softcap : (scale < 0 ? -scale : scale)) * attention::kLog2E);
  return result;
}

}  // namespace sink_attention::cuda
