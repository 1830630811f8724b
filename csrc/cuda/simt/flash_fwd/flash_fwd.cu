#include "cuda/simt/backend.h"
#include "cuda/simt/flash_fwd/kernel.cuh"
#include "cuda/simt/launch.cuh"

namespace sink_attention::cuda {
namespace {

template <class Kernel>
int64_t tiles_of(const attention::FlashFwdParams& params) {
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  return simt::divide_up(rows, Kernel::kBlockM);
}

template <class Real>
void check(const attention::FlashFwdParams& params) {
  if (params.num_heads_q == 0) return;
  simt::with_head_dim(params, [&](auto head_dim) {
    using Kernel = simt::FlashFwdKernel<simt::FlashFwdTiles<Real, head_dim()>>;
    simt::grid_of(params, tiles_of<Kernel>(params));
  });
}

template <class Real>
void start(const attention::FlashFwdParams& params, Stream stream) {
  if (params.num_heads_q == 0) return;
  simt::with_head_dim(params, [&](auto head_dim) {
    using Kernel = simt::FlashFwdKernel<simt::FlashFwdTiles<Real, head_dim()>>;
    const int64_t tiles = tiles_of<Kernel>(params);
    primitives::launch<Kernel>({params, static_cast<int>(tiles)}, simt::grid_of(params, tiles),
                               stream);
  });
}

}  // namespace

void check_flash_fwd_float32(const attention::FlashFwdParams& params) { check<float>(params); }

void check_flash_fwd_float64(const attention::FlashFwdParams& params) { check<double>(params); }

void flash_fwd_float32(const attention::FlashFwdParams& params, Stream stream) {
  start<float>(params, stream);
}

void flash_fwd_float64(const attention::FlashFwdParams& params, Stream stream) {
  start<double>(params, stream);
}

}  // namespace sink_attention::cuda
