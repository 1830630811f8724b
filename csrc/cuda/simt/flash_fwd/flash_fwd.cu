#include "cuda/simt/backend.h"
#include "cuda/simt/flash_fwd/kernel.cuh"
#include "cuda/simt/launch.cuh"

namespace sink_attention::cuda {
namespace {

template <class Real>
void start(const attention::FlashFwdProblem& problem, Stream stream) {
  if (problem.num_heads_q == 0) return;
  simt::with_head_dim(problem, [&](auto head_dim) {
    using Kernel = simt::FlashFwdKernel<simt::FlashFwdTiles<Real, head_dim()>>;
    const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
    const int64_t tiles = simt::divide_up(rows, Kernel::kBlockM);
    primitives::launch<Kernel>({problem, static_cast<int>(tiles)}, simt::grid_of(problem, tiles),
                               stream);
  });
}

}  // namespace

void flash_fwd_float32(const attention::FlashFwdProblem& problem, Stream stream) {
  start<float>(problem, stream);
}

void flash_fwd_float64(const attention::FlashFwdProblem& problem, Stream stream) {
  start<double>(problem, stream);
}

}  // namespace sink_attention::cuda
