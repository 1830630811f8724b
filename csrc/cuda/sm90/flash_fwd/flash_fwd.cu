// The forward's entry: which head_dim class, and whether one launch can take a problem.
#include <algorithm>
#include <stdexcept>

#include "cuda/sm90/flash_fwd/config.h"
#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/sm90/flash_fwd/problem.h"

namespace sink_attention::cuda::sm90 {

namespace {

using attention::FlashFwdProblem;

// A head_dim class: rows of a tile, and the kernel.
struct HeadDimClass {
  int tile_rows;
  void (*run)(const FlashFwdProblem& problem, int num_sms, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimClass make_class(void (*run)(const FlashFwdProblem&, int, Stream)) {
  return {FlashFwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, run};
}

HeadDimClass class_of(const FlashFwdProblem& problem) {
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 64) return make_class<64, 64>(flash_fwd_hdim64);
  if (larger <= 96) return make_class<96, 96>(flash_fwd_hdim96);
  if (larger <= 128) return make_class<128, 128>(flash_fwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_class<192, 128>(flash_fwd_hdim192_128);
  if (larger <= 192) return make_class<192, 192>(flash_fwd_hdim192);
  return make_class<256, 256>(flash_fwd_hdim256);
}

}  // namespace

void check_flash_fwd(const FlashFwdProblem& problem) {
  const int tile_rows = class_of(problem).tile_rows;
  const int64_t rows = problem.seqlen_q * (problem.num_heads_q / problem.num_heads_kv);
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  if (tiles * problem.batch * problem.num_heads_kv > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
}

void flash_fwd(const FlashFwdProblem& problem, const Device& device, Stream stream) {
  class_of(problem).run(problem, device.num_sms, stream);
}

}  // namespace sink_attention::cuda::sm90
