#include "cuda/simt/backend.h"
#include "cuda/simt/flash_fwd/kernel.cuh"
#include "cuda/simt/launch.cuh"

namespace sink_attention::cuda {
namespace {

template <class Kernel>
int64_t tiles_of(const attention::FlashFwdProblem& problem) {
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  return simt::divide_up(rows, Kernel::kBlockM);
}

template <class Real>
void check(const attention::FlashFwdProblem& problem) {
  if (problem.num_heads_q == 0) return;
  simt::with_head_dim(problem, [&](auto head_dim) {
    using Kernel = simt::FlashFwdKernel<simt::FlashFwdTiles<Real, head_dim()>>;
    simt::grid_of(problem, tiles_of<Kernel>(problem));
  });
}

template <class Real>
void start(const attention::FlashFwdProblem& problem, Stream stream) {
  if (problem.num_heads_q == 0) return;
  simt::with_head_dim(problem, [&](auto head_dim) {
    using Kernel = simt::FlashFwdKernel<simt::FlashFwdTiles<Real, head_dim()>>;
    const int64_t tiles = tiles_of<Kernel>(problem);
    primitives::launch<Kernel>({problem, static_cast<int>(tiles)}, simt::grid_of(problem, tiles),
                               stream);
  });
}

}  // namespace

void check_flash_fwd_float32(const attention::FlashFwdProblem& problem) { check<float>(problem); }

void check_flash_fwd_float64(const attention::FlashFwdProblem& problem) { check<double>(problem); }

void flash_fwd_float32(const attention::FlashFwdProblem& problem, Stream stream) {
  start<float>(problem, stream);
}

void flash_fwd_float64(const attention::FlashFwdProblem& problem, Stream stream) {
  start<double>(problem, stream);
}

}  // namespace sink_attention::cuda
