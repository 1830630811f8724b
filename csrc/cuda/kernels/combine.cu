#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/combine.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int kManySplits = 8;  // splits that one warp loads at once

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t partial_rows(const attention::FlashFwdParams& params, int num_splits) {
  return num_splits == 1 ? 0 : num_splits * params.num_heads_q * params.total_q;
}

int64_t state_bytes(const attention::FlashFwdParams& params, int num_splits) {
  return round_up(partial_rows(params, num_splits) * 2 * sizeof(float));
}

using Kernel = CombineKernel<attention::BFloat16>;

bool has_block_per_row(int num_splits) { return num_splits > kManySplits; }

int64_t tiles_of(const attention::FlashFwdParams& params, int num_splits) {
  const int tile_rows = has_block_per_row(num_splits) ? 1 : Kernel::kRowsPerBlock;
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  return (rows + tile_rows - 1) / tile_rows;
}

}  // namespace

int64_t partials_bytes(const attention::FlashFwdParams& params, int num_splits) {
  return state_bytes(params, num_splits) +
         round_up(partial_rows(params, num_splits) * params.head_dim_v * sizeof(float));
}

Partials partials_in(void* workspace, const attention::FlashFwdParams& params, int num_splits) {
  if (num_splits == 1) return {nullptr, nullptr};
  char* base = static_cast<char*>(workspace);
  return {reinterpret_cast<float*>(base),
          reinterpret_cast<float*>(base + state_bytes(params, num_splits))};
}

void check_combine(const attention::FlashFwdParams& params, int num_splits) {
  if (tiles_of(params, num_splits) * params.batch > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  if (params.num_heads_kv > kMaxGridY) {
    throw std::runtime_error("sink_attention_ext: more kv heads than one launch can take");
  }
}

void combine(const attention::FlashFwdParams& params, int num_splits, const Partials& partials,
             void* stream) {
  check_combine(params, num_splits);
  const int num_tiles = static_cast<int>(tiles_of(params, num_splits));
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
