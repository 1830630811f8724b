// Hopper's decode: few query rows over a paged cache, whose keys are split among warps and blocks.
#pragma once

#include "attention/paged_kv.h"
#include "attention/params.h"
#include "cuda/backend.h"
#include "cuda/sm90/decode/launch.h"

namespace sink_attention::cuda::sm90 {

// Why a problem is not for these kernels; null if it is. Looks at shapes, strides and pointers'
// alignment, at no memory: lengths there may change between two replays of a captured graph.
// num_splits == 1 is never taken, since there a row's sums must have prefill's order.
inline const char* why_not_decode(const attention::FlashFwdParams& params) {
  using attention::DataType;
  if (params.block_table == nullptr) return "k and v are not in a paged cache";
  if (params.num_splits == 1) return "num_splits is 1";
  if (params.dtype != DataType::kBFloat16 && params.dtype != DataType::kFloat16) {
    return "q is neither bfloat16 nor float16";
  }
  if (num_pack_gqa_rows(params) > kManyRows) {
    return "a kv head's query heads times seqlen_q are more than 64 rows";
  }
  const int64_t bytes = attention::bytes_of(params.kv_dtype);
  const auto are_chunks = [bytes](const void* base, int64_t dims_and_strides) {
    return (reinterpret_cast<uintptr_t>(base) | dims_and_strides * bytes) % 16 == 0;
  };
  if (!are_chunks(params.k, params.head_dim | params.k_stride_batch | params.k_stride_row |
                                params.k_stride_head) ||
      !are_chunks(params.v, params.head_dim_v | params.v_stride_batch | params.v_stride_row |
                                params.v_stride_head)) {
    return "rows of k or v are not in aligned parts of 16 bytes";
  }
  const auto chunks = [&](int64_t stride_page, int64_t stride_slot) {
    return (params.num_pages * stride_page + params.page_size * stride_slot) * bytes / 16;
  };
  constexpr int64_t kMaxChunks = (int64_t{1} << 32) - 1;
  if (chunks(params.k_stride_batch, params.k_stride_row) >= kMaxChunks ||
      chunks(params.v_stride_batch, params.v_stride_row) >= kMaxChunks) {
    return "a cache has 64 GiB or more";
  }
  return nullptr;
}

// What decode needs for the same problem on the same device; it may be 0. Throws std::runtime_error
// where one launch cannot take it.
int64_t decode_workspace_bytes(const attention::FlashFwdParams& params, const Device& device);

// out and lse of each row that a sequence has, sink included. Owns its splits (params.num_splits
// of them at most, or by shapes and device.num_sms where that is 0) and joins them
// (common/combine.h). Only for problems that are taken, with batch, seqlen_q and num_heads_q above
// 0 and device.arch == 90; `workspace` as backend.h says: aligned to 256 bytes, contents not set.
// Throws std::runtime_error where a launch fails.
void decode(const attention::FlashFwdParams& params, const Device& device, void* workspace,
            Stream stream);

}  // namespace sink_attention::cuda::sm90
