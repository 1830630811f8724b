// The backward's two kernels, after each other. Each computes the scores for itself, so that no
// number has two writers.
#include "cuda/simt/backend.h"
#include "cuda/simt/flash_bwd/dk_dv_kernel.cuh"
#include "cuda/simt/flash_bwd/dq_kernel.cuh"
#include "cuda/simt/launch.cuh"

namespace sink_attention::cuda {
namespace {

template <class Kernel, class Real>
void start_kernel(const attention::FlashBwdProblem& problem, const Real* delta, int64_t rows,
                  Stream stream) {
  const int64_t tiles = simt::divide_up(rows, Kernel::kBlockM);
  primitives::launch<Kernel>({problem, delta, static_cast<int>(tiles)},
                             simt::grid_of(problem.fwd, tiles), stream);
}

template <class Real>
void start(const attention::FlashBwdProblem& problem, const Real* delta, Stream stream) {
  const attention::FlashFwdProblem& fwd = problem.fwd;
  if (fwd.num_heads_q == 0) return;
  simt::with_head_dim(fwd, [&](auto head_dim) {
    using Tiles = simt::FlashBwdTiles<Real, head_dim()>;
    const int64_t rows = fwd.seqlen_q * (fwd.num_heads_q / fwd.num_heads_kv);
    start_kernel<simt::FlashBwdDqKernel<Tiles>>(problem, delta, rows, stream);
    start_kernel<simt::FlashBwdDkDvKernel<Tiles>>(problem, delta, fwd.seqlen_k, stream);
  });
}

}  // namespace

void flash_bwd_float32(const attention::FlashBwdProblem& problem, const float* delta,
                       Stream stream) {
  start(problem, delta, stream);
}

void flash_bwd_float64(const attention::FlashBwdProblem& problem, const double* delta,
                       Stream stream) {
  start(problem, delta, stream);
}

}  // namespace sink_attention::cuda
