// Chooses a forward kernel for a problem and starts it.
#pragma once

#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm80/flash_fwd/kernel.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {

template <class Kernel, class Tiles>
void launch_tiles(FlashFwdKernelProblem kernel_problem, Stream stream) {
  const attention::FlashFwdProblem& problem = kernel_problem.problem;
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  kernel_problem.num_tiles = static_cast<int>((rows + Tiles::kBlockM - 1) / Tiles::kBlockM);
  const primitives::Index3 grid{static_cast<int>(kernel_problem.num_tiles * problem.batch),
                                static_cast<int>(problem.num_heads_kv) * kernel_problem.num_splits,
                                1};
  primitives::launch<Kernel>(kernel_problem, grid, stream);
}

// One head_dim class: bfloat16 or float16, tiles for prefill or decode.
template <int kHeadDim, int kHeadDimV>
void launch_flash_fwd(const FlashFwdKernelProblem& kernel_problem, bool decode, Stream stream) {
  using attention::BFloat16;
  using attention::Float16;
  using PrefillTiles = Prefill<kHeadDim, kHeadDimV>;
  using DecodeTiles = Decode<kHeadDim, kHeadDimV>;
  if (kernel_problem.problem.dtype == attention::DataType::kBFloat16) {
    decode
        ? launch_tiles<FlashFwdKernel<BFloat16, DecodeTiles>, DecodeTiles>(kernel_problem, stream)
        : launch_tiles<FlashFwdKernel<BFloat16, PrefillTiles>, PrefillTiles>(kernel_problem,
                                                                             stream);
  } else {
    decode
        ? launch_tiles<FlashFwdKernel<Float16, DecodeTiles>, DecodeTiles>(kernel_problem, stream)
        : launch_tiles<FlashFwdKernel<Float16, PrefillTiles>, PrefillTiles>(kernel_problem, stream);
  }
}

}  // namespace sink_attention::cuda::sm80
