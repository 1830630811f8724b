// A head's sink, of whatever dtype, as a natural logarithm in float32; -inf where there is none.
#pragma once

#include "attention/numeric.h"
#include "attention/online_softmax.h"
#include "attention/params.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

SA_DEVICE float load_sink(const attention::FlashFwdParams& params, int head) {
  using primitives::load_global;
  if (params.s_aux == nullptr) return attention::negative_infinity<float>();
  switch (params.s_aux_dtype) {
    case attention::DataType::kFloat64:
      return static_cast<float>(load_global(static_cast<const double*>(params.s_aux) + head));
    case attention::DataType::kFloat32:
      return load_global(static_cast<const float*>(params.s_aux) + head);
    case attention::DataType::kFloat16:
      return attention::to_float(
          load_global(static_cast<const attention::Float16*>(params.s_aux) + head));
    default:
      return attention::to_float(
          load_global(static_cast<const attention::BFloat16*>(params.s_aux) + head));
  }
}

}  // namespace sink_attention::cuda
