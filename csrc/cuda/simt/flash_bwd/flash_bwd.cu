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
void start_kernel(const attention::FlashBwdParams& params, const Real* delta, int64_t rows,
                  Stream stream) {
  const int64_t tiles = simt::divide_up(rows, Kernel::kBlockM);
  primitives::launch<Kernel>({params, delta, static_cast<int>(tiles)},
                             simt::grid_of(params.fwd, tiles), stream);
}

template <class Real>
void start_rows(const attention::FlashBwdParams& params, Real* delta, Stream stream) {
  const attention::FlashFwdParams& fwd = params.fwd;
  if (fwd.num_heads_q == 0) return;
  using Kernel = simt::FlashBwdDeltaKernel<Real>;
  const int64_t rows = fwd.seqlen_q * (fwd.num_heads_q / fwd.num_heads_kv);
  const int64_t tiles = simt::divide_up(rows, Kernel::kBlockM);
  const simt::FlashBwdRowsParams<Real> kernel_params{params, delta, static_cast<int>(tiles)};
  primitives::launch<Kernel>(kernel_params, simt::grid_of(fwd, tiles), stream);
  if (params.ds_aux == nullptr) return;
  primitives::launch<simt::FlashBwdSinkKernel<Real>>(
      kernel_params, {static_cast<int>(fwd.num_heads_q), 1, 1}, stream);
}

template <class Real>
void start(const attention::FlashBwdParams& params, const Real* delta, Stream stream) {
  const attention::FlashFwdParams& fwd = params.fwd;
  if (fwd.num_heads_q == 0) return;
  simt::with_head_dim(fwd, [&](auto head_dim) {
    using Tiles = simt::FlashBwdTiles<Real, head_dim()>;
    const int64_t rows = fwd.seqlen_q * (fwd.num_heads_q / fwd.num_heads_kv);
    start_kernel<simt::FlashBwdDqKernel<Tiles>>(params, delta, rows, stream);
    start_kernel<simt::FlashBwdDkDvKernel<Tiles>>(params, delta, fwd.seqlen_k, stream);
  });
}

}  // namespace

void flash_bwd_rows_float32(const attention::FlashBwdParams& params, float* delta, Stream stream) {
  start_rows(params, delta, stream);
}

void flash_bwd_rows_float64(const attention::FlashBwdParams& params, double* delta, Stream stream) {
  start_rows(params, delta, stream);
}

void flash_bwd_float32(const attention::FlashBwdParams& params, const float* delta, Stream stream) {
  start(params, delta, stream);
}

void flash_bwd_float64(const attention::FlashBwdParams& params, const double* delta,
                       Stream stream) {
  start(params, delta, stream);
}

}  // namespace sink_attention::cuda
