#include "cuda/common/combine.cuh"
#include "cuda/common/combine.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {

void combine(const attention::FlashFwdProblem& problem, int num_splits, const float* partial_state,
             const float* partial_out, void* stream) {
  constexpr int kRows = CombineKernel<attention::BFloat16>::kRowsPerBlock;
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  const int num_tiles = static_cast<int>((rows + kRows - 1) / kRows);
  const CombineProblem parts{problem, num_tiles, num_splits, partial_state, partial_out};
  const primitives::Index3 grid{static_cast<int>(num_tiles * problem.batch),
                                static_cast<int>(problem.num_heads_kv), 1};
  if (problem.dtype == attention::DataType::kBFloat16) {
    primitives::launch<CombineKernel<attention::BFloat16>>(parts, grid, stream);
  } else {
    primitives::launch<CombineKernel<attention::Float16>>(parts, grid, stream);
  }
}

}  // namespace sink_attention::cuda
