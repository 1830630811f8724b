// The backward's kernels, after each other. The two of the products both compute the scores, so
// that no number has two writers.
#include "cuda/simt/backend.h"
#include "cuda/simt/flash_bwd/dk_dv_kernel.cuh"
#include "cuda/simt/flash_bwd/dq_kernel.cuh"
#include "cuda/simt/flash_bwd/rows_kernel.cuh"
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
void start_rows(const attention::FlashBwdProblem& problem, Real* delta, Stream stream) {
  const attention::FlashFwdProblem& fwd = problem.fwd;
  if (fwd.num_heads_q == 0) return;
  using Kernel = simt::FlashBwdDeltaKernel<Real>;
  const int64_t rows = fwd.seqlen_q * (fwd.num_heads_q / fwd.num_heads_kv);
  const int64_t tiles = simt::divide_up(rows, Kernel::kBlockM);
  const simt::FlashBwdRowsProblem<Real> kernel_problem{problem, delta, static_cast<int>(tiles)};
  primitives::launch<Kernel>(kernel_problem, simt::grid_of(fwd, tiles), stream);
  if (problem.ds_aux == nullptr) return;
  primitives::launch<simt::FlashBwdSinkKernel<Real>>(
      kernel_problem, {static_cast<int>(fwd.num_heads_q), 1, 1}, stream);
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

void flash_bwd_rows_float32(const attention::FlashBwdProblem& problem, float* delta,
                            Stream stream) {
  start_rows(problem, delta, stream);
}

void flash_bwd_rows_float64(const attention::FlashBwdProblem& problem, double* delta,
                            Stream stream) {
  start_rows(problem, delta, stream);
}

void flash_bwd_float32(const attention::FlashBwdProblem& problem, const float* delta,
                       Stream stream) {
  start(problem, delta, stream);
}

void flash_bwd_float64(const attention::FlashBwdProblem& problem, const double* delta,
                       Stream stream) {
  start(problem, delta, stream);
}

}  // namespace sink_attention::cuda
