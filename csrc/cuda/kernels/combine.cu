#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/combine.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {

void combine(const attention::FlashFwdParams& params, const CallShape& shape, int num_splits,
             const Partials& partials, void* stream) {
  static_assert(CombineKernel<attention::BFloat16>::kRowsPerBlock == kCombineWarps);
  const int num_tiles = static_cast<int>(combine_tiles(shape, num_splits));
  const CombineParams parts{params, num_tiles, num_splits, has_block_per_row(num_splits), partials};
  const primitives::Index3 grid{static_cast<int>(num_tiles * params.batch),
                                static_cast<int>(params.num_heads_kv), 1};
  if (params.dtype == attention::DataType::kBFloat16) {
    primitives::launch<CombineKernel<attention::BFloat16>>(parts, grid, stream);
  } else {
    primitives::launch<CombineKernel<attention::Float16>>(parts, grid, stream);
  }
}

}  // namespace sink_attention::cuda
