// Decode's entry: how many splits, and which head-dim bucket.
#include <algorithm>
#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/kernels/combine.h"
#include "cuda/kernels/splits.h"
#include "cuda/sm90/decode/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda::sm90 {
namespace {

using attention::FlashFwdParams;

// Fewer keys a split are not worth the merge: two blocks of 16-bit keys, one of 8-bit ones.
constexpr int64_t kMinSplitKeys = 128;

// Blocks that the card runs at once.
int64_t slots_of(const FlashFwdParams& params, const Device& device) {
  const bool two =
      num_pack_gqa_rows(params) <= kFewRows && std::max(params.head_dim, params.head_dim_v) <= 192;
  return std::max<int64_t>(device.num_sms * (two ? 2 : 1), 1);
}

// How long all blocks take, in times that one block would take for all of its keys.
double duration(int64_t blocks, int64_t splits, int64_t slots) {
  const int64_t waves = (blocks * splits + slots - 1) / slots;
  return static_cast<double>(waves) / static_cast<double>(splits);
}

// Lengths in device memory are not known here: the longest that there can be counts. A split of a
// shorter sequence has fewer keys, or none and ends at once.
int64_t wanted_splits(const FlashFwdParams& params, const Device& device) {
  if (params.num_splits > 0) return limit_splits(params, params.num_splits);
  const int64_t most = limit_splits(params, most_keys(params) / kMinSplitKeys);
  const int64_t slots = slots_of(params, device);
  const int64_t blocks = std::max<int64_t>(params.batch * params.num_heads_kv, 1);
  // Where there are few, as many as run at once.
  if (2 * blocks <= slots) return std::min(slots / blocks, most);
  // Else so many that the last wave of blocks is nearly as full as the others: the fewest that are
  // within a tenth of the best.
  double best = duration(blocks, 1, slots);
  for (int64_t splits = 2; splits <= most; ++splits) {
    best = std::min(best, duration(blocks, splits, slots));
  }
  int64_t splits = 1;
  while (duration(blocks, splits, slots) > 1.1 * best) ++splits;
  return splits;
}

// kv heads and splits lie along one dimension of the grid.
int choose_splits(const FlashFwdParams& params, const Device& device) {
  const int64_t most = std::max<int64_t>(kMaxGridY / params.num_heads_kv, 1);
  return static_cast<int>(std::min(wanted_splits(params, device), most));
}

}  // namespace

int64_t decode_workspace_bytes(const FlashFwdParams& params, const Device& device) {
  if (params.num_heads_kv > kMaxGridY || params.batch > INT32_MAX) {
    throw std::runtime_error(
        "sink_attention_ext: more sequences or kv heads than one launch can take");
  }
  const int num_splits = choose_splits(params, device);
  if (num_splits > 1) check_combine(params, num_splits);
  return partials_bytes(params, num_splits);
}

void decode(const FlashFwdParams& params, const Device& device, void* workspace, Stream stream) {
  DecodeKernelParams kernel_params{};
  kernel_params.attn = params;
  kernel_params.scale = score_scale(params);
  kernel_params.q_is_vectorised = rows_are_vectorised(
      params.q, params.head_dim, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
  kernel_params.num_splits = choose_splits(params, device);
  const Partials partials = partials_in(workspace, params, kernel_params.num_splits);
  kernel_params.partial_state = partials.state;
  kernel_params.partial_out = partials.out;
  const int64_t dim = params.head_dim;
  const int64_t dim_v = params.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) {
    decode_hdim32(kernel_params, stream);
  } else if (larger <= 64) {
    decode_hdim64(kernel_params, stream);
  } else if (larger <= 96) {
    decode_hdim96(kernel_params, stream);
  } else if (larger <= 128) {
    decode_hdim128(kernel_params, stream);
  } else if (dim <= 192 && dim_v <= 128) {
    decode_hdim192_128(kernel_params, stream);
  } else if (larger <= 192) {
    decode_hdim192(kernel_params, stream);
  } else {
    decode_hdim256(kernel_params, stream);
  }
  if (kernel_params.num_splits > 1) {
    combine(params, kernel_params.num_splits, partials, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
