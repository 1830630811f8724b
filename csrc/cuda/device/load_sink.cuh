// A query head's attention sink: a natural-log logit in the softmax's denominator, without a value.
#pragma once

#include "attention/online_softmax.h"
#include "attention/params.h"
#include "cuda/device/element.cuh"

namespace sink_attention::cuda {

// s_aux[head], of whatever dtype, as Real; -inf without s_aux.
template <class Real = float>
SA_DEVICE Real load_sink(const attention::FlashFwdParams& params, int head) {
  if (params.s_aux == nullptr) return attention::negative_infinity<Real>();
  return load_element<Real>(params.s_aux, params.s_aux_dtype, head);
}

}  // namespace sink_attention::cuda
