#include "torch/check_values.h"

#include <cmath>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/seqlen_info.h"
#include "torch/checks.h"

namespace sink_attention::binding {
namespace {

using attention::FlashFwdParams;

void check_cu_seqlens(const int32_t* cu_seqlens, const char* name, int64_t batch, int64_t rows,
                      const char* rows_name) {
  check(cu_seqlens[0] == 0, name, "[0] must be 0; got ", cu_seqlens[0]);
  for (int64_t i = 1; i <= batch; ++i) {
    check(cu_seqlens[i] >= cu_seqlens[i - 1], name, " must not fall; got ", name, "[", i,
          "] = ", cu_seqlens[i], " after ", cu_seqlens[i - 1]);
  }
  check(cu_seqlens[batch] <= rows, name, "[", batch, "] must be at most ", rows_name, " = ", rows,
        "; got ", cu_seqlens[batch]);
}

void check_seqused_k(const FlashFwdParams& params) {
  const bool varlen = params.cu_seqlens_k != nullptr;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t capacity =
        varlen ? params.cu_seqlens_k[b + 1] - params.cu_seqlens_k[b] : params.seqlen_k;
    check(params.seqused_k[b] >= 0 && params.seqused_k[b] <= capacity,
          varlen ? "seqused_k[" : "cache_seqlens[", b, "] must be in [0, ", capacity, "] (",
          varlen ? "the sequence's keys" : "what the cache holds of it, at most max_seqlen_k",
          "); got ", params.seqused_k[b]);
  }
}

// Only pages that some query sees are read, so only those need to exist: a windowed layer's older
// pages, but for those of sink tokens, may be gone.
void check_block_table(const FlashFwdParams& params, int64_t batch_idx, int64_t num_pages) {
  const attention::SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  const attention::BlockList<int64_t> read = attention::blocks_of(
      attention::make_mask(params, info).visible_keys(0, info.seqlen_q), params.page_size);
  const int32_t* pages = params.block_table + batch_idx * params.block_table_stride;
  for (int64_t idx = 0; idx < read.count(); ++idx) {
    const int64_t i = read.block(idx);
    check(pages[i] >= 0 && pages[i] < num_pages, "block_table[", batch_idx, ", ", i,
          "] must be in [0, ", num_pages, ") (k_cache's pages); got ", pages[i]);
  }
}

// Of an append: room for the new keys, whose pages exist.
void check_append(const attention::AppendKvParams& append, int64_t batch_idx, int64_t num_new,
                  int64_t max_seqlen_k) {
  const int64_t capacity = append.max_pages_per_seq * append.page_size;
  const int64_t first = append.cache_seqlens[batch_idx], end = first + num_new;
  if (num_new > capacity) {
    check(false, "cache_seqlens[", batch_idx, "] must be so that ", num_new,
          " new tokens fit into the ", capacity, " that the sequence's cache holds; got ", first);
  }
  check(first >= 0 && end <= capacity, "cache_seqlens[", batch_idx, "] must be from 0 to ",
        capacity - num_new, ", so that ", num_new, " new tokens fit into the ", capacity,
        " that the sequence's cache holds; got ", first);
  check(end <= max_seqlen_k, "max_seqlen_k must be at least every sequence's length; got ",
        max_seqlen_k, " but sequence ", batch_idx, " has ", end, " keys after the append");
  if (append.block_table == nullptr) return;
  const int32_t* pages = append.block_table + batch_idx * append.block_table_stride;
  for (int64_t i = first / append.page_size; i * append.page_size < end && num_new > 0; ++i) {
    check(pages[i] >= 0 && pages[i] < append.num_pages, "block_table[", batch_idx, ", ", i,
          "] must be in [0, ", append.num_pages, ") (k_cache's pages); got ", pages[i]);
  }
}

// Scales of a whole cache or of its heads. Those of single tokens come from the op that writes
// them.
template <class Params>
void check_scales(const Params& params) {
  const std::pair<const char*, const float*> scales[] = {{"k_scale", params.k_scale},
                                                         {"v_scale", params.v_scale}};
  for (const auto& [name, scale] : scales) {
    if (scale == nullptr) continue;
    const int64_t count = params.kv_scale_stride == 0 ? 1 : params.num_heads_kv;
    for (int64_t i = 0; i < count; ++i) {
      check(can_scale(scale[i]), name, "[", i,
            "] must be finite, of a magnitude from 2**-126 to 2**126; got ", scale[i]);
    }
  }
}

// A draft token is its own and perhaps others' descendant, never of one that comes after it.
void check_tree_mask(const FlashFwdParams& params, int64_t batch_idx) {
  const attention::SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  const int64_t* tree = attention::tree_of(params, info);
  for (int64_t i = 0; i < info.seqlen_q; ++i) {
    check(static_cast<uint64_t>(tree[i]) >> i == 1, "tree_mask must have bit ", i,
          " set and none above it in the word of draft token ", i, " of sequence ", batch_idx,
          "; got ", tree[i]);
  }
}

}  // namespace

bool can_scale(float scale) {
  const float magnitude = std::abs(scale);
  return magnitude >= 0x1p-126f && magnitude <= 0x1p126f;  // not where it is NaN
}

void check_values(const FlashFwdParams& params, const Extent& extent) {
  check_scales(params);
  if (params.cu_seqlens_q != nullptr) {
    check_cu_seqlens(params.cu_seqlens_q, "cu_seqlens_q", params.batch, extent.q_rows, "total_q");
  }
  if (params.cu_seqlens_k != nullptr) {
    check_cu_seqlens(params.cu_seqlens_k, "cu_seqlens_k", params.batch, extent.k_rows, "total_k");
  }
  if (params.seqused_k != nullptr) check_seqused_k(params);
  for (int64_t b = 0; b < params.batch; ++b) {
    const attention::SeqlenInfo info = attention::seqlen_info(params, b);
    check(info.seqlen_q <= params.seqlen_q,
          "max_seqlen_q must be at least every sequence's length; got ", params.seqlen_q,
          " but sequence ", b, " has ", info.seqlen_q, " queries");
    check(info.seqlen_k <= params.seqlen_k,
          "max_seqlen_k must be at least every sequence's length; got ", params.seqlen_k,
          " but sequence ", b, " has ", info.seqlen_k, " keys");
    if (params.block_table != nullptr) check_block_table(params, b, extent.num_pages);
    if (params.tree_mask != nullptr) check_tree_mask(params, b);
  }
}

void check_values(const FlashFwdParams& params, const attention::AppendKvParams& append,
                  const Extent& extent) {
  if (append.cu_seqlens_q != nullptr) {
    check_cu_seqlens(append.cu_seqlens_q, "cu_seqlens_q", append.batch, extent.q_rows, "total_q");
  }
  for (int64_t b = 0; b < append.batch; ++b) {
    const int64_t num_new = append.cu_seqlens_q == nullptr
                                ? append.seqlen_new
                                : append.cu_seqlens_q[b + 1] - append.cu_seqlens_q[b];
    check_append(append, b, num_new, params.seqlen_k);
    append.seqused_k[b] = static_cast<int32_t>(append.cache_seqlens[b] + num_new);
  }
  check_values(params, extent);
}

void check_values(const attention::ReshapeAndCacheParams& params, int64_t num_pages) {
  check_scales(params);
  const int64_t num_slots = num_pages * params.page_size;
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    check(slot >= -1 && slot < num_slots, "slot_mapping[", token, "] must be -1 (skip) or in [0, ",
          num_slots, ") (num_pages * page_size); got ", slot);
  }
}

}  // namespace sink_attention::binding
