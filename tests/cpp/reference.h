// The reference that kernels are compared with: attention with sinks by its definition, in float64.
// It reads the params struct, and shares no code with the backends.
#pragma once

#include <cmath>
#include <vector>

#include "array.h"

namespace sink_attention::tests {

using attention::FlashBwdParams;
using attention::FlashFwdParams;

struct ReferenceForward {
  std::vector<double> out;  // [rows of q][num_heads_q][head_dim_v]; NaN in rows of no sequence
  std::vector<double> lse;  // [num_heads_q][rows of q]
};

struct ReferenceBackward {
  std::vector<double> dq, dk,
      dv;  // [rows][heads][dim]; NaN in rows of no sequence, or beyond seqused_k
  std::vector<double> ds_aux;  // [num_heads_q]
};

// Rows are counted over the batch: dense row i of sequence b is b * seqlen + i.
ReferenceForward reference_forward(const FlashFwdParams& params, int64_t q_rows);

// Reads the forward's out and lse from params.fwd, as the kernels do.
ReferenceBackward reference_backward(const FlashBwdParams& params, int64_t q_rows, int64_t k_rows);

}  // namespace sink_attention::tests
