// A job of the forward: a tile of one kv head against keys packed ahead, or, in decode, a tile of
// several kv heads against keys that only this job reads.
//
// Several kv heads take turns at each block of keys because what counts in decode is to read the
// cache in the order in which it lies. In a cache [page][slot][head][dim] one head's rows are a
// small piece of each token's; read alone they keep a few of the memory's channels busy (8.5 of 21
// GB/s measured on a Zen 4 server). So all heads go over some keys while the next keys' tokens are
// prefetched whole.
#pragma once

#include "cpu/simd/fwd_tile.h"
#include "cpu/simd/in_place.h"

namespace sink_attention::cpu::SA_ISA {

template <class Arithmetic>
FwdPlan plan_fwd(const FlashFwdParams& params) {
  return ForwardTile<Arithmetic>::make_plan(params);
}

// Packs one block of keys for the kv heads [head_begin, head_end), one after the other into
// `packed`.
template <class Arithmetic>
void pack_blocks(const FlashFwdParams& params, const FwdPlan& plan, int64_t batch_idx,
                 int64_t head_begin, int64_t head_end, int64_t block_idx,
                 attention::KeySet readable, char* packed) {
  using Unit = typename Arithmetic::Unit;
  using Geo = Geometry<Arithmetic>;
  const SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  const int64_t first = block_idx * plan.block_keys;
  const int64_t last = min_of(first + plan.block_keys, info.seqlen_k);
  const Range some_readable = readable.within({first, last});
  const int64_t heads = head_end - head_begin;
  const int64_t head_stride = plan.packed_k_bytes + plan.packed_v_bytes;
  const KeyRows keys = attention::key_rows(params, batch_idx, info, head_begin, readable);
  const KeyRows values = attention::value_rows(params, batch_idx, info, head_begin, readable);
  for (int64_t key = first; key < last; key += Geo::kPanel) {
    if (key + Geo::kPanel <= some_readable.begin || key >= some_readable.end) continue;
    const int64_t end = min_of(key + Geo::kPanel, last);
    for (int64_t head = 0; head < heads; ++head) {
      prefetch_panel<Arithmetic>(keys, params.k_stride_head, key + Geo::kPanel, head, heads);
      Unit* k = reinterpret_cast<Unit*>(packed + head * head_stride);
      pack_transposed<Arithmetic>(
          attention::key_rows(params, batch_idx, info, head_begin + head, readable), key, end,
          k + (key - first) * Geo::units(params.head_dim));
    }
    for (int64_t head = 0; head < heads; ++head) {
      prefetch_panel<Arithmetic>(values, params.v_stride_head, key + Geo::kPanel, head, heads);
      Unit* v = reinterpret_cast<Unit*>(packed + head * head_stride + plan.packed_k_bytes);
      pack_rowwise<Arithmetic>(
          attention::value_rows(params, batch_idx, info, head_begin + head, readable), key, end,
          plan.block_keys, v + (key - first) / Geo::kPair * Geo::kPanel);
    }
  }
}

// One strip of each kv head of a task against blocks of keys read where they lie (in_place.h).
template <class Arithmetic>
class StripsInPlace {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  using Tile = ForwardTile<Arithmetic>;
  using Geo = Geometry<Arithmetic>;

  // Keys that all heads go over before the next ones, which are fetched meanwhile: few enough for
  // both to stay in L2, enough to make up for loading and storing each head's output once a chunk.
  static constexpr int64_t kChunkKeys = 64;

 public:
  StripsInPlace(const FlashFwdParams& params, const FwdPlan& plan, const FwdTask& task)
      : params_(params),
        plan_(plan),
        task_(task),
        first_(params, plan, task, task.kv_head_begin),
        heads_(task.kv_head_end - task.kv_head_begin),
        rows_(static_cast<int>(first_.rows)),
        stride_(Tile::score_stride(plan)),
        kv_bytes_(attention::bytes_of(params.kv_dtype)),
        readable_(first_.mask.visible_keys(task.q_begin, task.q_end)),
        keys_(attention::key_rows(params, task.batch_idx, first_.info, task.kv_head_begin,
                                  readable_)),
        values_(attention::value_rows(params, task.batch_idx, first_.info, task.kv_head_begin,
                                      readable_)) {
    for (int64_t head = 0; head < heads_; ++head) {
      strip_to_lanes(of_head(first_.scratch.q, head), Tile::q_stride(params), rows_,
                     Geo::units(params.head_dim), of_head(first_.scratch.q_lanes, head));
    }
  }

  // Number idx of the task's blocks.
  void attend_block(int64_t idx) {
    const int64_t first = task_.blocks.block(idx) * plan_.block_keys;
    const auto [seen_begin, seen_end] = first_.seen_panels(first, 0, rows_);
    if (seen_begin >= seen_end) return;
    const int64_t begin = first + seen_begin;
    const int64_t end = first + seen_end;
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      RowPrefetcher ahead =
          key + kChunkKeys < end ? fetch_keys(key + kChunkKeys, end) : fetch_values(begin, end);
      score_chunk(key, min_of(kChunkKeys, end - key), key - begin, ahead);
    }
    Real rescale[kMaxHeadsPerJob][kTileRows];
    for (int64_t head = 0; head < heads_; ++head) {
      Tile(params_, plan_, task_, task_.kv_head_begin + head)
          .softmax(first, 0, rows_, seen_begin, seen_end, rescale[head]);
    }
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      RowPrefetcher ahead =
          key + kChunkKeys < end ? fetch_values(key + kChunkKeys, end) : fetch_next_block(idx, end);
      accumulate_chunk(key, min_of(kChunkKeys, end - key), key - begin, rescale, ahead);
      for (int64_t head = 0; head < heads_; ++head) {
        for (Real& factor : rescale[head]) factor = 1;
      }
    }
  }

 private:
  // Where a chunk's rows lie.
  struct Chunk {
    bool is_whole;                 // no key is missing
    const char* rows[kChunkKeys];  // of the first head; null for a key that may not be read
    const char* rows_of_head[kChunkKeys];

    // Addresses of rows of the head `offset` bytes on, to which the returned offset is to be added.
    const char* const* turn_to_head(int64_t& offset, int64_t count) {
      alignas(64) static const Real zeros[kMaxHeadDim] = {};
      if (is_whole) return rows;
      for (int64_t i = 0; i < count; ++i) {
        rows_of_head[i] =
            rows[i] == nullptr ? reinterpret_cast<const char*>(zeros) : rows[i] + offset;
      }
      offset = 0;
      return rows_of_head;
    }
  };

  static void find_chunk(const KeyRows& source, int64_t key, int64_t count, Chunk& chunk) {
    chunk.is_whole = source.readable.holds_all({key, key + count});
    for (int64_t i = 0; i < count; ++i) {
      chunk.rows[i] = chunk.is_whole || source.is_readable(key + i)
                          ? static_cast<const char*>(source.row(key + i))
                          : nullptr;
    }
  }

  RowPrefetcher fetch_keys(int64_t begin, int64_t end) const {
    return {
        keys_, params_.k_stride_head * kv_bytes_, heads_, {begin, min_of(begin + kChunkKeys, end)}};
  }
  // The first keys of the block after number idx of the task's, whose keys end at `end`.
  RowPrefetcher fetch_next_block(int64_t idx, int64_t end) const {
    if (idx + 1 == task_.idx_end) return fetch_keys(end, end);
    const int64_t first = task_.blocks.block(idx + 1) * plan_.block_keys;
    const Range next = readable_.within({first, first + plan_.block_keys});
    return fetch_keys(next.begin, next.end);
  }
  RowPrefetcher fetch_values(int64_t begin, int64_t end) const {
    return {values_,
            params_.v_stride_head * kv_bytes_,
            heads_,
            {begin, min_of(begin + kChunkKeys, end)}};
  }

  // The same piece of scratch of a head further on.
  template <class T>
  T* of_head(T* of_first, int64_t head) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(of_first) +
                                head * plan_.tile_scratch_bytes);
  }

  // Scores of the keys [key, key + count) of all heads, to column `column` of each head's scores.
  void score_chunk(int64_t key, int64_t count, int64_t column, RowPrefetcher& ahead) const {
    constexpr int kKeys = std::min(kMaxScoreKeys, Geo::kPanel);
    Chunk chunk;
    find_chunk(keys_, key, count, chunk);
    for (int64_t head = 0; head < heads_; ++head) {
      int64_t offset = head * params_.k_stride_head * kv_bytes_;
      const char* const* rows = chunk.turn_to_head(offset, count);
      Real* scores = of_head(first_.scratch.scores, head) + column;
      for (int64_t i = 0; i < count; i += kKeys) {
        score_keys<Arithmetic, kKeys>(rows + i, offset, Geo::units(params_.head_dim),
                                      of_head(first_.scratch.q_lanes, head), scores + i, stride_,
                                      ahead);
      }
    }
  }

  // Adds the values of these keys to all heads' outputs.
  void accumulate_chunk(int64_t key, int64_t count, int64_t column,
                        const Real (*rescale)[kTileRows], RowPrefetcher& ahead) const {
    Chunk chunk;
    find_chunk(values_, key, count, chunk);
    for (int64_t head = 0; head < heads_; ++head) {
      int64_t offset = head * params_.v_stride_head * kv_bytes_;
      const char* const* rows = chunk.turn_to_head(offset, count);
      const Unit* weights =
          reinterpret_cast<const Unit*>(of_head(first_.scratch.scores, head)) + column / Geo::kPair;
      Real* out = of_head(first_.scratch.out, head);
      for (int64_t dim = 0; dim < params_.head_dim_v; dim += Geo::kPanel) {
        accumulate_columns_rows<Arithmetic>(rows_, rows, offset + dim * kv_bytes_,
                                            count / Geo::kPair, rest_of_chain(key / Geo::kPair),
                                            weights, stride_, rescale[head], out + dim,
                                            params_.head_dim_v, &ahead);
      }
    }
  }

  const FlashFwdParams& params_;
  const FwdPlan& plan_;
  const FwdTask& task_;
  const Tile first_;  // of the first head
  const int64_t heads_;
  const int rows_;
  const int64_t stride_;
  const int64_t kv_bytes_;  // of one number
  const attention::KeySet readable_;
  const KeyRows keys_, values_;  // of the first head
};

template <class Arithmetic>
void fwd_tile(const FlashFwdParams& params, const FwdPlan& plan, const FwdTask& task) {
  using Tile = ForwardTile<Arithmetic>;
  const int64_t heads = task.kv_head_end - task.kv_head_begin;
  const int64_t block_bytes = plan.packed_k_bytes + plan.packed_v_bytes;
  char* packed_here = task.scratch + heads * plan.tile_scratch_bytes;
  for (int64_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
    Tile(params, plan, task, head).load_q();
  }
  const int64_t rows = (task.q_end - task.q_begin) * (params.num_heads_q / params.num_heads_kv);
  const attention::KeySet readable =
      Tile(params, plan, task, task.kv_head_begin).mask.visible_keys(task.q_begin, task.q_end);
  const bool in_place =
      task.packed == nullptr && rows <= kTileRows && can_read_in_place<Arithmetic>(params);
  int64_t pieces_banked = 0;
  const auto bank_before = [&](int64_t idx) {
    if (idx == task.idx_begin ||
        Tile::piece(plan, task.blocks.block(idx)) == Tile::piece(plan, task.blocks.block(idx - 1)))
      return;
    for (int64_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
      Tile(params, plan, task, head).bank_piece(pieces_banked == 0);
    }
    ++pieces_banked;
  };
  if constexpr (kHasStripVec<typename Arithmetic::Real>) {
    if (in_place) {
      StripsInPlace<Arithmetic> strips(params, plan, task);
      for (int64_t idx = task.idx_begin; idx < task.idx_end; ++idx) {
        bank_before(idx);
        strips.attend_block(idx);
      }
    }
  }
  for (int64_t idx = task.idx_begin; idx < task.idx_end && !in_place; ++idx) {
    bank_before(idx);
    const int64_t block_idx = task.blocks.block(idx);
    const char* packed = packed_here;
    if (task.packed == nullptr) {
      pack_blocks<Arithmetic>(params, plan, task.batch_idx, task.kv_head_begin, task.kv_head_end,
                              block_idx, readable, packed_here);
    } else {
      packed = task.packed + task.packed_blocks.index(block_idx) * block_bytes;
    }
    for (int64_t head = task.kv_head_begin; head < task.kv_head_end;
         ++head, packed += block_bytes) {
      Tile(params, plan, task, head).attend_block(block_idx, packed);
    }
  }
  for (int64_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
    Tile tile(params, plan, task, head);
    if (pieces_banked > 0) tile.take_totals();
    if (task.partial != nullptr) {
      tile.store_partial(task.partial + (head - task.kv_head_begin) * task.partial_stride);
    } else {
      tile.finish();
    }
  }
}

template <class Arithmetic>
void combine_splits(const FlashFwdParams& params, const FwdPlan& plan, const FwdTask& task,
                    int64_t num_splits, int64_t split_stride) {
  ForwardTile<Arithmetic> tile(params, plan, task, task.kv_head_begin);
  tile.clear_sums();
  for (int64_t split = 0; split < num_splits; ++split) {
    tile.merge_partial(task.partial + split * split_stride);
    tile.bank_piece(split == 0);
  }
  tile.take_totals();
  tile.finish();
}

}  // namespace sink_attention::cpu::SA_ISA
