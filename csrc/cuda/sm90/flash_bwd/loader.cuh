// The warp that brings a backward block its keys, and tile after tile of queries.
//
// Rows of queries lie one box a slab where their group divides a tile. A tile that is not wholly in
// its sequence is copied chunk by chunk where other sequences follow, since what lies there must
// not reach a product; where none follow, TMA writes the zeros.
#pragma once

#include "cuda/sm90/flash_bwd/block.cuh"
#include "cuda/sm90/flash_bwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"
#include "cuda/tile/copy.cuh"
#include "primitives/bulk.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashBwdLoader {
  using Storage = FlashBwdStorage<Element, Tiles>;
  using Block = FlashBwdBlock<Tiles>;
  using Place = typename Ring<Tiles::kStages>::Place;
  static constexpr int kBlockM = Tiles::kBlockM;
  static constexpr int kFloatBytes = kBlockM * static_cast<int>(sizeof(float));

  const FlashBwdKernelProblem& problem;
  const Block block;
  Storage& storage;

  // All lanes of the warp call.
  SA_DEVICE void run() {
    const int tiles_begin = block.tiles_begin();
    Place q_at;
    Place dout_at;
    int tile = block.tiles_end() - 1;
    load_block<false>(storage.k, problem.has_k_map ? &problem.k_map : nullptr, &storage.k_full);
    load_q(tile, q_at.stage);
    q_at.advance();
    load_block<true>(storage.v, problem.has_v_map ? &problem.v_map : nullptr, &storage.v_full);
    load_dout(tile, dout_at.stage);
    dout_at.advance();
    while (--tile >= tiles_begin) {  // consumers are done with dO first
      storage.dout_ring.wait_until_empty(dout_at);
      load_dout(tile, dout_at.stage);
      dout_at.advance();
      storage.q_ring.wait_until_empty(q_at);
      load_q(tile, q_at.stage);
      q_at.advance();
    }
    // Whoever started copies stays until they have ended.
    SA_ROLLED
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      storage.q_ring.wait_until_empty(q_at);
      storage.dout_ring.wait_until_empty(dout_at);
      q_at.advance();
      dout_at.advance();
    }
  }

 private:
  SA_DEVICE static int lane() { return primitives::lane_idx_anew(); }

  template <bool kValues, class Tile>
  SA_DEVICE void load_block(Tile& tile, const primitives::TensorMap* map,
                            primitives::Mbarrier* full) const {
    const attention::SeqlenInfo info = attention::seqlen_info(block.fwd(), block.batch_idx());
    const attention::KeySet all{0, {0, info.seqlen_k}};
    const auto source =
        key_source<kValues>(block.fwd(), block.batch_idx(), block.kv_head(), info, all);
    load_keys(tile, source,
              key_boxes(source, map, Tile::kRows, static_cast<int>(info.k_row),
                        static_cast<int>(info.k_batch), block.kv_head()),
              block.first_key(), full, lane());
  }

  // With the rows' lse and what they see of the block.
  SA_DEVICE void load_q(int tile, int stage) {
    const attention::FlashFwdProblem& fwd = block.fwd();
    const int masked = block.needs_mask(tile);
    if (masked) {
      SA_ROLLED
      for (int row = lane(); row < kBlockM; row += primitives::kWarpSize) {
        primitives::store_shared(storage.window[stage] + row, block.window(tile * kBlockM + row));
      }
    }
    if (lane() == 0) primitives::store_shared(&storage.is_masked[stage], masked);
    load_rows(storage.q[stage].tile, tile, fwd.q, fwd.q_stride_batch, fwd.q_stride_row,
              fwd.q_stride_head, static_cast<int>(fwd.head_dim),
              problem.has_q_map ? &problem.q_map : nullptr, storage.lse_log2[stage],
              problem.workspace.lse_log2, &storage.q_ring.full[stage]);
  }

  SA_DEVICE void load_dout(int tile, int stage) {
    const attention::FlashBwdProblem& bwd = problem.bwd;
    load_rows(storage.dout[stage].tile, tile, bwd.dout, bwd.dout_stride_batch, bwd.dout_stride_row,
              bwd.dout_stride_head, static_cast<int>(bwd.fwd.head_dim_v),
              problem.has_dout_map ? &problem.dout_map : nullptr, storage.delta[stage],
              problem.workspace.delta, &storage.dout_ring.full[stage]);
  }

  // The tile's rows of a tensor, and their floats of the workspace.
  template <class Tile>
  SA_DEVICE void load_rows(Tile& to, int tile, const void* tensor, int64_t stride_batch,
                           int64_t stride_row, int64_t stride_head, int cols,
                           const primitives::TensorMap* map, float* floats,
                           const float* workspace_floats, primitives::Mbarrier* full) const {
    const attention::SeqlenInfo info = attention::seqlen_info(block.fwd(), block.batch_idx());
    const int lane = this->lane();
    const int first_row = tile * kBlockM;
    const bool is_alone = block.fwd().cu_seqlens_q == nullptr;
    const bool boxes = map != nullptr && (is_alone || first_row + kBlockM <= block.num_rows());
    if (!boxes) {
      const Element* first = static_cast<const Element*>(tensor) + info.q_batch * stride_batch +
                             info.q_row * stride_row +
                             int64_t{block.kv_head()} * block.group() * stride_head;
      const int num_rows = block.num_rows();
      copy_rows(to, cols, lane, [&](int row) -> const Element* {
        row += first_row;
        const int position = row / block.group();
        return row < num_rows
                   ? first + position * stride_row + (row - position * block.group()) * stride_head
                   : nullptr;
      });
      primitives::cp_async_commit();
      primitives::cp_async_wait<0>();
      primitives::fence_proxy_async();
    }
    if (lane == 0) {
      const int tile_bytes = boxes ? static_cast<int>(sizeof(to.data)) : 0;
      primitives::mbarrier_arrive_expect_tx(full, kFloatBytes + tile_bytes);
      primitives::bulk_load(floats, workspace_floats + block.workspace_tile(tile) * kBlockM,
                            kFloatBytes, full);
    } else {
      primitives::mbarrier_arrive(full);
    }
    if (boxes) {
      const int position = static_cast<int>(info.q_row) + first_row / block.group();
      if (lane < kSlabs<Tile>) {
        primitives::tma_load<5>(
            to.data + lane * Tile::kRows * Tile::kSlabCols, map, full,
            {lane * Tile::kSlabCols, 0, position, block.kv_head(), static_cast<int>(info.q_batch)});
      }
    }
  }
};

}  // namespace sink_attention::cuda::sm90
