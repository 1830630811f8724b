// What tensors in host memory hold, checked before anything is computed or written: lengths, block
// tables, slots. On a device they cannot be read without waiting for it (debug_checks.h).
#pragma once

#include "attention/params.h"

namespace sink_attention::binding {

// cu_seqlens_* start at 0, do not fall and end within the rows there are; no sequence is longer
// than the maximum given; seqused_k is within what the sequence, or its row of the block table,
// holds; every page with a visible key exists; each word of a tree mask has its own bit and none
// above; scales of the cache, but for those of single tokens, can scale. Rows: of q and, in varlen,
// of k. num_pages: of the cache, where the problem is paged.
struct Extent {
  int64_t q_rows;
  int64_t k_rows;
  int64_t num_pages;
};
void check_values(const attention::FlashFwdParams& params, const Extent& extent);

// The same of attention after an append, which has room, and pages, for the new keys. Sets
// append.seqused_k, which is params.seqused_k.
void check_values(const attention::FlashFwdParams& params, const attention::AppendKvParams& append,
                  const Extent& extent);

// Every slot is -1 or within num_pages * page_size, and scales that are read are as below.
void check_values(const attention::ReshapeAndCacheParams& params, int64_t num_pages);

// Whether numbers can be divided by a scale in float32 and multiplied with it again: 0, NaN,
// infinities and magnitudes without a normal reciprocal turn all of them into 0, infinity or NaN.
bool can_scale(float scale);

}  // namespace sink_attention::binding
