// The forward's entry: which head-dim bucket, and whether one launch can take a problem.
#include <algorithm>
#include <stdexcept>

#include "cuda/sm90/flash_fwd/config.h"
#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/sm90/flash_fwd/params.h"

namespace sink_attention::cuda::sm90 {

namespace {

using attention::FlashFwdParams;

// A head-dim bucket: rows of a tile, and the kernel.
struct HeadDimBucket {
  int tile_rows;
  void (*run)(const FlashFwdParams& params, int num_sms, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimBucket make_bucket(void (*run)(const FlashFwdParams&, int, Stream)) {
  return {FlashFwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, run};
}

HeadDimBucket bucket_of(const FlashFwdParams& params) {
  const int64_t dim = params.head_dim;
  const int64_t dim_v = params.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 64) return make_bucket<64, 64>(flash_fwd_hdim64);
  if (larger <= 96) return make_bucket<96, 96>(flash_fwd_hdim96);
  if (larger <= 128) return make_bucket<128, 128>(flash_fwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_bucket<192, 128>(flash_fwd_hdim192_128);
  if (larger <= 192) return make_bucket<192, 192>(flash_fwd_hdim192);
  return make_bucket<256, 256>(flash_fwd_hdim256);
}

}  // namespace

void check_flash_fwd(const FlashFwdParams& params) {
  const int tile_rows = bucket_of(params).tile_rows;
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  if (tiles * params.batch * params.num_heads_kv > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
}

void flash_fwd(const FlashFwdParams& params, const Device& device, Stream stream) {
  bucket_of(params).run(params, device.num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
