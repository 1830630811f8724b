// A block of keys of the backward and the tiles of query rows that see some of it, as all of its
// warps know them.
#pragma once

#include "attention/block_list.h"
#include "attention/mask.h"
#include "cuda/sm90/flash_bwd/problem.h"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "primitives/memory.h"

namespace sink_attention::cuda::sm90 {

template <class Tiles>
struct FlashBwdBlock {
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kBlockN = Tiles::kBlockN;

  const FlashBwdKernelProblem& problem;
  const FlashBwdBlockInfo& info;  // in shared memory

  SA_DEVICE const attention::FlashFwdProblem& fwd() const { return problem.bwd.fwd; }
  // Block x: blocks of keys fastest, then sequences; y: kv head.
  SA_DEVICE int batch_idx() const { return primitives::block_idx().x / problem.num_key_blocks; }
  SA_DEVICE int kv_head() const { return primitives::block_idx().y; }
  SA_DEVICE int group() const { return problem.group; }
  SA_DEVICE int first_key() const { return primitives::load_shared(&info.first_key); }
  SA_DEVICE int sink_end() const { return primitives::load_shared(&info.sink_end); }
  SA_DEVICE int tiles_begin() const { return primitives::load_shared(&info.tiles_begin); }
  SA_DEVICE int tiles_end() const { return primitives::load_shared(&info.tiles_end); }
  SA_DEVICE int seqlen_q() const { return primitives::load_shared(&info.seqlen_q); }
  SA_DEVICE int seqlen_k() const { return primitives::load_shared(&info.seqlen_k); }
  SA_DEVICE int num_rows() const { return seqlen_q() * group(); }
  // Of the block, those that exist; a block that has none does nothing.
  SA_DEVICE int num_keys() const {
    return static_cast<int>(attention::min_of(kBlockN, seqlen_k() - first_key()));
  }
  SA_DEVICE int64_t workspace_tile(int tile) const {
    return primitives::load_shared(&info.first_workspace_tile) + tile;
  }
  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(fwd(), seqlen_q(), seqlen_k());
  }

  // By one thread.
  SA_DEVICE void describe(FlashBwdBlockInfo& to) const {
    const PackedRows rows = packed_rows(fwd(), batch_idx(), kv_head());
    const int seqlen_q = static_cast<int>(rows.info.seqlen_q);
    const int seqlen_k = static_cast<int>(rows.info.seqlen_k);
    const int first_key =
        static_cast<int>(primitives::block_idx().x) % problem.num_key_blocks * kBlockN;
    const attention::Range queries =
        attention::make_mask(fwd(), seqlen_q, seqlen_k)
            .visible_queries(first_key, attention::min_of(first_key + kBlockN, seqlen_k));
    const bool some = queries.begin < queries.end;
    primitives::store_shared(&to.first_key, first_key);
    primitives::store_shared(
        &to.sink_end,
        static_cast<int>(attention::min_of(fwd().num_sink_tokens, seqlen_k)) - first_key);
    primitives::store_shared(&to.seqlen_q, seqlen_q);
    primitives::store_shared(&to.seqlen_k, seqlen_k);
    primitives::store_shared(&to.tiles_begin,
                             some ? static_cast<int>(queries.begin) * group() / kBlockM : 0);
    primitives::store_shared(
        &to.tiles_end,
        some ? (static_cast<int>(queries.end) * group() + kBlockM - 1) / kBlockM : 0);
    primitives::store_shared(&to.first_workspace_tile,
                             kv_head() * problem.workspace.num_tiles +
                                 static_cast<int>(first_tile(fwd(), batch_idx(), kBlockM)));
  }

  SA_DEVICE int last_position(int tile) const {
    return (static_cast<int>(attention::min_of((tile + 1) * kBlockM, num_rows())) - 1) / group();
  }

  // Whether some row of the tile may not see some key of the block. Rows beyond the sequence need
  // no mask: their lse is +inf.
  SA_DEVICE bool needs_mask(int tile) const {
    const int first = tile * kBlockM / group();
    const attention::Range full = mask().keys_seen_by_all(first, last_position(tile) + 1);
    return full.begin > first_key() || full.end < first_key() + kBlockN;
  }

  // Of the block's keys, those in a row's window; none where there is no such row.
  SA_DEVICE KeyRange window(int row) const {
    if (row >= num_rows()) return {0, 0};
    const attention::Range keys = attention::intersect(mask().window_keys(row / group()),
                                                       {first_key(), first_key() + num_keys()});
    return {static_cast<int>(keys.begin - first_key()), static_cast<int>(keys.end - first_key())};
  }

  // How many blocks of keys add to the tile's dQ before this one: those that a row of it sees.
  SA_DEVICE int turn_at(int tile) const {
    const int first = tile * kBlockM / group();
    return attention::blocks_of(mask().visible_keys(first, last_position(tile) + 1), kBlockN)
        .index(first_key() / kBlockN);
  }
};

}  // namespace sink_attention::cuda::sm90
