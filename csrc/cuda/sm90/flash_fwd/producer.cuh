// The warp that copies: for each work Q, then K and V of its blocks of keys in turn, as far ahead
// as the rings have room.
#pragma once

#include "cuda/sm90/flash_fwd/storage.cuh"
#include "cuda/sm90/load_keys.cuh"

namespace sink_attention::cuda::sm90 {

template <class Element, class Tiles>
struct FlashFwdProducer {
  using Storage = FlashFwdStorage<Element, Tiles>;
  using QRing = Ring<Tiles::kQueryStages>;
  using KRing = Ring<Tiles::kStages>;

  const FlashFwdKernelParams& params;
  Storage& storage;
  WorkPlace work_at{};

  SA_DEVICE void run() {
    if (primitives::lane_idx() == 0) prefetch_maps();
    typename QRing::Place q_at;
    typename KRing::Place at;  // K's and V's
    for (; storage.works.wait_for(work_at); storage.works.release(work_at)) {
      const int count = blocks_of_work(work()).count();
      if (count > 0) load_work(count, q_at, at);
    }
    wait_for_users(q_at, at);
  }

 private:
  SA_DEVICE void prefetch_maps() const {
    if (params.q_uses_tma) primitives::prefetch_tensor_map(&params.q_map);
    if (params.k_uses_tma) primitives::prefetch_tensor_map(&params.k_map);
    if (params.v_uses_tma) primitives::prefetch_tensor_map(&params.v_map);
  }

  SA_DEVICE const Work<Tiles::kConsumers>& work() const {
    return storage.works.work[work_at.slot()];
  }

  SA_DEVICE void load_work(int count, typename QRing::Place& q_at, typename KRing::Place& at) {
    SA_ROLLED
    for (int idx = 0; idx < count; ++idx) {
      storage.k_ring.wait_until_empty(at);
      primitives::Mbarrier* k_full = &storage.k_ring.full[at.stage];
      const bool has_arrived = start_block<false>(storage.k[at.stage], idx, k_full);
      if (idx == 0) {  // the first keys do not wait for Q's buffer, which is in use for longer
        storage.q_ring.wait_until_empty(q_at);
        load_queries(storage.q[q_at.stage], &storage.q_ring.full[q_at.stage]);
      }
      if (!has_arrived) finish_chunks(k_full);
      storage.loaded_v_ring().wait_until_empty(at);
      primitives::Mbarrier* v_full = &storage.loaded_v_ring().full[at.stage];
      if (!start_block<true>(storage.loaded_v(at.stage), idx, v_full)) finish_chunks(v_full);
      at.advance();
    }
    q_at.advance();
  }

  // As start_keys does, and returns what it does.
  template <bool kValues, class Tile>
  SA_DEVICE bool start_block(Tile& tile, int idx, primitives::Mbarrier* full) {
    using primitives::load_shared;
    const Work<Tiles::kConsumers>& work = this->work();
    const KeySource<kValues> source{params.attn,
                                    load_shared(kValues ? &work.v_base : &work.k_base),
                                    load_shared(&work.pages),
                                    nullptr,
                                    load_shared(&work.sink_end),
                                    load_shared(&work.key_begin),
                                    load_shared(&work.key_end)};
    const bool use_tma = kValues ? params.v_uses_tma : params.k_uses_tma;
    KeyBoxes boxes = key_boxes(
        source, use_tma ? (kValues ? &params.v_map : &params.k_map) : nullptr, params.box_rows,
        load_shared(&work.k_row), load_shared(&work.k_batch), load_shared(&work.kv_head));
    // With a block table boxes need pages, which keys beyond the sequence's need not have.
    boxes.may_be_anything = !kValues && source.pages == nullptr;
    return start_keys(tile, source, boxes, blocks_of_work(work).block(idx) * Tiles::kBlockN, full,
                      primitives::lane_idx());
  }

  // The tile's rows of Q; where they are no boxes, chunk by chunk.
  SA_DEVICE void load_queries(typename Storage::QTile& tile, primitives::Mbarrier* full) {
    using primitives::load_shared;
    using QTile = typename Storage::QTile;
    const int lane = primitives::lane_idx();
    if (params.q_uses_tma) {
      if (lane == 0) {
        primitives::mbarrier_arrive_expect_tx(full, static_cast<int>(sizeof(tile.data)));
      } else {
        primitives::mbarrier_arrive(full);
      }
      if (lane < kSlabs<QTile>) {
        const int at[5] = {lane * QTile::kSlabCols, 0,
                           load_shared(&work().q_row) + load_shared(&work().position),
                           load_shared(&work().kv_head), load_shared(&work().q_batch)};
        primitives::tma_load<5>(tile.data + lane * QTile::kRows * QTile::kSlabCols, &params.q_map,
                                full, at);
      }
      return;
    }
    const attention::FlashFwdParams& fwd = params.attn;
    const PackGqa rows = rows_of_work(work(), params.qhead_per_khead);
    const int row_begin = load_shared(&work().row_begin);
    using Stored = typename QTile::Element;
    copy_rows(tile, static_cast<int>(fwd.head_dim), lane, [&](int row) {
      return row_begin + row < rows.num_rows ? static_cast<const Stored*>(fwd.q) +
                                                   rows.offset(row_begin + row, fwd.q_stride_batch,
                                                               fwd.q_stride_row, fwd.q_stride_head)
                                             : nullptr;
    });
    primitives::cp_async_commit();
    finish_chunks(full);
  }

  // Until all that was copied has been used: nothing is under way when the warp ends.
  SA_DEVICE void wait_for_users(typename QRing::Place q_at, typename KRing::Place at) {
    for (int stage = 0; stage < Tiles::kQueryStages; ++stage) {
      storage.q_ring.wait_until_empty(q_at);
      q_at.advance();
    }
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      storage.k_ring.wait_until_empty(at);
      storage.loaded_v_ring().wait_until_empty(at);
      at.advance();
    }
  }
};

}  // namespace sink_attention::cuda::sm90
