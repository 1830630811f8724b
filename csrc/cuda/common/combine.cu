#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/common/combine.cuh"
#include "cuda/common/combine.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int kManySplits = 8;  // what one warp has under way at once

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t partial_rows(const attention::FlashFwdProblem& problem, int num_splits) {
  return num_splits == 1 ? 0 : num_splits * problem.num_heads_q * problem.total_q;
}

int64_t state_bytes(const attention::FlashFwdProblem& problem, int num_splits) {
  return round_up(partial_rows(problem, num_splits) * 2 * sizeof(float));
}

using Kernel = CombineKernel<attention::BFloat16>;

bool has_block_per_row(int num_splits) { return num_splits > kManySplits; }

int64_t tiles_of(const attention::FlashFwdProblem& problem, int num_splits) {
  const int tile_rows = has_block_per_row(num_splits) ? 1 : Kernel::kRowsPerBlock;
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  return (rows + tile_rows - 1) / tile_rows;
}

}  // namespace

int64_t partials_bytes(const attention::FlashFwdProblem& problem, int num_splits) {
  return state_bytes(problem, num_splits) +
         round_up(partial_rows(problem, num_splits) * problem.head_dim_v * sizeof(float));
}

Partials partials_in(void* workspace, const attention::FlashFwdProblem& problem, int num_splits) {
  if (num_splits == 1) return {nullptr, nullptr};
  char* base = static_cast<char*>(workspace);
  return {reinterpret_cast<float*>(base),
          reinterpret_cast<float*>(base + state_bytes(problem, num_splits))};
}

void check_combine(const attention::FlashFwdProblem& problem, int num_splits) {
  if (tiles_of(problem, num_splits) * problem.batch > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  if (problem.num_heads_kv > kMaxGridY) {
    throw std::runtime_error("sink_attention_ext: more kv heads than one launch can take");
  }
}

void combine(const attention::FlashFwdProblem& problem, int num_splits, const Partials& partials,
             void* stream) {
  check_combine(problem, num_splits);
  const int num_tiles = static_cast<int>(tiles_of(problem, num_splits));
  const CombineProblem parts{problem, num_tiles, num_splits, has_block_per_row(num_splits),
                             partials};
  const primitives::Index3 grid{static_cast<int>(num_tiles * problem.batch),
                                static_cast<int>(problem.num_heads_kv), 1};
  if (problem.dtype == attention::DataType::kBFloat16) {
    primitives::launch<CombineKernel<attention::BFloat16>>(parts, grid, stream);
  } else {
    primitives::launch<CombineKernel<attention::Float16>>(parts, grid, stream);
  }
}

}  // namespace sink_attention::cuda
