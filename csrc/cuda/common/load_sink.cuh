// A head's sink, of whatever dtype, as a natural logarithm in float32; -inf where there is none.
#pragma once

#include "attention/numeric.h"
#include "attention/online_softmax.h"
#include "attention/problem.h"
#include "primitives/memory.h"

namespace sink_attention::cuda {

SA_DEVICE float load_sink(const attention::FlashFwdProblem& problem, int head) {
  using primitives::load_global;
  if (problem.s_aux == nullptr) return attention::negative_infinity<float>();
  switch (problem.s_aux_dtype) {
    case attention::DataType::kFloat64:
      return static_cast<float>(load_global(static_cast<const double*>(problem.s_aux) + head));
    case attention::DataType::kFloat32:
      return load_global(static_cast<const float*>(problem.s_aux) + head);
    case attention::DataType::kFloat16:
      return attention::to_float(
          load_global(static_cast<const attention::Float16*>(problem.s_aux) + head));
    default:
      return attention::to_float(
          load_global(static_cast<const attention::BFloat16*>(problem.s_aux) + head));
  }
}

}  // namespace sink_attention::cuda
