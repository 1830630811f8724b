// Partial results of a split-KV forward: their layout in the workspace, and the combine kernel.
#pragma once

#include "attention/params.h"

namespace sink_attention::cuda {

constexpr int kMaxSplits = 64;

// Arrays [num_splits][num_heads_q][total_q], without the sink. Null with one split.
struct Partials {
  float* state;  // maximum and sum of a row, base 2: two floats
  float* out;    // output not yet divided by the sum: head_dim_v floats
};

// Bytes and pointers of the partial results in a workspace that is aligned to 256 bytes.
int64_t partials_bytes(const attention::FlashFwdParams& params, int num_splits);
Partials partials_in(void* workspace, const attention::FlashFwdParams& params, int num_splits);

// Throws std::runtime_error if one launch cannot take all rows.
void check_combine(const attention::FlashFwdParams& params, int num_splits);
void combine(const attention::FlashFwdParams& params, int num_splits, const Partials& partials,
             void* stream);

}  // namespace sink_attention::cuda
