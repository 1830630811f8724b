// Joins partial results (combine.cuh), and where they lie meanwhile.
#pragma once

#include "attention/params.h"

namespace sink_attention::cuda {

constexpr int kMaxSplits = 64;

// [num_splits][num_heads_q][total_q]: the state (maximum and sum, base 2; two floats) and the
// undivided output (head_dim_v floats) of each row, without the sink. Null where nothing is split.
struct Partials {
  float* state;
  float* out;
};

// Of a workspace that is aligned to 256 bytes.
int64_t partials_bytes(const attention::FlashFwdParams& params, int num_splits);
Partials partials_in(void* workspace, const attention::FlashFwdParams& params, int num_splits);

// Throws std::runtime_error where one launch cannot take all rows.
void check_combine(const attention::FlashFwdParams& params, int num_splits);
void combine(const attention::FlashFwdParams& params, int num_splits, const Partials& partials,
             void* stream);

}  // namespace sink_attention::cuda
