// How a score becomes a logit in base 2. Computed on the host: it takes doubles.
#pragma once

#include "attention/host_device.h"
#include "attention/online_softmax.h"
#include "attention/params.h"

namespace sink_attention::cuda {

enum ScoreForm : int {
  kPlain,    // logit = score * softmax_scale_log2
  kNegated,  // logit = -score * softmax_scale_log2, where the scale is negative
  kSoftcap,  // logit = tanh(score * to_tanh) * softmax_scale_log2; softmax_scale_log2 is then softcap * log2 e
};

struct ScoreScale {
  float softmax_scale_log2;  // > 0
  float to_tanh;
  int form;  // a ScoreForm

  // The same for keys that are yet to be multiplied with a factor (a float8 cache's scale).
  SA_HOST_DEVICE ScoreScale times(float factor) const {
    ScoreScale result = *this;
    if (form == kSoftcap) {
      result.to_tanh *= factor;
    } else {
      result.softmax_scale_log2 *= factor < 0 ? -factor : factor;
      if (factor < 0) result.form = form == kPlain ? kNegated : kPlain;
    }
    return result;
  }
};

inline ScoreScale score_scale(const attention::FlashFwdParams& params) {
  // A scale of 0 would turn a hidden score into 0 * inf; one this small has the same exponentials.
  const double scale = params.softmax_scale == 0 ? 1e-30 : params.softmax_scale;
  if (params.softcap > 0) {
    return {static_cast<float>(params.softcap * attention::kLog2E),
            static_cast<float>(scale / params.softcap), kSoftcap};
  }
  return {static_cast<float>((scale < 0 ? -scale : scale) * attention::kLog2E), 0.0f,
          scale < 0 ? kNegated : kPlain};
}

// The backward's, whose kernels keep softmax_scale_log2 signed: no negated form.
template <class KernelParams>
void set_bwd_score_scale(const attention::FlashFwdParams& params, KernelParams& kernel_params) {
  kernel_params.has_softcap = params.softcap > 0;
  const double scale = params.softmax_scale;
  kernel_params.to_tanh =
      kernel_params.has_softcap ? static_cast<float>(scale / params.softcap) : 0.0f;
  kernel_params.softmax_scale_log2 =
      static_cast<float>((kernel_params.has_softcap ? params.softcap : scale) * attention::kLog2E);
}

}  // namespace sink_attention::cuda
