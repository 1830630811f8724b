// One job of the forward (kernels.h):
//
//   prefill   a tile of one kv head, against keys that were packed ahead
//   decode    a tile of several kv heads, against keys that only this job reads
//
// Decode is bound by memory bandwidth, so the cache [page][slot][head][dim] is read in memory
// order. One head's rows are a small part of each token's: read alone, they reached 8.5 of 21 GB/s
// on a Zen 4 server. So all heads process a few keys while the next tokens are prefetched whole.
#pragma once

#include "cpu/simd/fwd_tile.h"
#include "cpu/simd/in_place.h"

namespace sink_attention::cpu::SA_ISA {

template <class Arithmetic>
FwdPlan plan_fwd(const FlashFwdParams& params) {
  return FwdTile<Arithmetic>::make_plan(params);
}

// Packs one block of keys of the kv heads [head_begin, head_end), head after head, into `packed`.
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

// The job's strips, one per kv head, against blocks of keys that are read in place (in_place.h).
template <class Arithmetic>
class StripsInPlace {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  using Tile = FwdTile<Arithmetic>;
  using Geo = Geometry<Arithmetic>;

  // Keys that all heads process before the next chunk, which is prefetched meanwhile. Two chunks
  // fit in L2; a chunk is long enough to amortise one load and store of each head's O.
  static constexpr int64_t kChunkKeys = 64;

 public:
  StripsInPlace(const FlashFwdParams& params, const FwdPlan& plan, const FwdJob& job)
      : params_(params),
        plan_(plan),
        job_(job),
        first_(params, plan, job, job.kv_head_begin),
        heads_(job.kv_head_end - job.kv_head_begin),
        rows_(static_cast<int>(first_.rows)),
        stride_(Tile::score_stride(plan)),
        kv_bytes_(attention::bytes_of(params.kv_dtype)),
        readable_(first_.mask.visible_keys(job.q_begin, job.q_end)),
        keys_(
            attention::key_rows(params, job.batch_idx, first_.info, job.kv_head_begin, readable_)),
        values_(attention::value_rows(params, job.batch_idx, first_.info, job.kv_head_begin,
                                      readable_)) {
    for (int64_t head = 0; head < heads_; ++head) {
      transpose_strip(of_head(first_.scratch.q, head), Tile::q_stride(params), rows_,
                      Geo::units(params.head_dim), of_head(first_.scratch.q_transposed, head));
    }
  }

  // Attends to entry idx of the job's list of blocks.
  void attend_block(int64_t idx) {
    const int64_t first = job_.blocks.block(idx) * plan_.block_keys;
    const auto [visible_begin, visible_end] = first_.visible_panels(first, 0, rows_);
    if (visible_begin >= visible_end) return;
    const int64_t begin = first + visible_begin;
    const int64_t end = first + visible_end;
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      RowPrefetcher ahead =
          key + kChunkKeys < end ? fetch_keys(key + kChunkKeys, end) : fetch_values(begin, end);
      score_chunk(key, min_of(kChunkKeys, end - key), key - begin, ahead);
    }
    Real rescale[kMaxHeadsPerJob][kTileRows];
    for (int64_t head = 0; head < heads_; ++head) {
      Tile(params_, plan_, job_, job_.kv_head_begin + head)
          .softmax(first, 0, rows_, visible_begin, visible_end, rescale[head]);
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
  // The addresses of a chunk's rows.
  struct Chunk {
    bool is_whole;                 // every key may be read
    const char* rows[kChunkKeys];  // of the first head; null for a key that may not be read
    const char* rows_of_head[kChunkKeys];

    // The addresses of another head's rows, `offset` bytes from the first head's. The caller adds
    // `offset` to each address; if the addresses include it already, it is set to 0.
    const char* const* rows_for_head(int64_t& offset, int64_t count) {
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
  // The first keys of the block after entry idx; none after the job's last block.
  RowPrefetcher fetch_next_block(int64_t idx, int64_t end) const {
    if (idx + 1 == job_.idx_end) return fetch_keys(end, end);
    const int64_t first = job_.blocks.block(idx + 1) * plan_.block_keys;
    const Range next = readable_.within({first, first + plan_.block_keys});
    return fetch_keys(next.begin, next.end);
  }
  RowPrefetcher fetch_values(int64_t begin, int64_t end) const {
    return {values_,
            params_.v_stride_head * kv_bytes_,
            heads_,
            {begin, min_of(begin + kChunkKeys, end)}};
  }

  // The scratch of another head: the same array as `of_first`.
  template <class T>
  T* of_head(T* of_first, int64_t head) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(of_first) +
                                head * plan_.tile_scratch_bytes);
  }

  // S of the keys [key, key + count) for all heads, at `column` of their scores.
  void score_chunk(int64_t key, int64_t count, int64_t column, RowPrefetcher& ahead) const {
    constexpr int kKeys = std::min(kMaxScoreKeys, Geo::kPanel);
    Chunk chunk;
    find_chunk(keys_, key, count, chunk);
    for (int64_t head = 0; head < heads_; ++head) {
      int64_t offset = head * params_.k_stride_head * kv_bytes_;
      const char* const* rows = chunk.rows_for_head(offset, count);
      Real* scores = of_head(first_.scratch.scores, head) + column;
      for (int64_t i = 0; i < count; i += kKeys) {
        score_keys<Arithmetic, kKeys>(rows + i, offset, Geo::units(params_.head_dim),
                                      of_head(first_.scratch.q_transposed, head), scores + i,
                                      stride_, ahead);
      }
    }
  }

  // O = O * rescale + P V of the same keys, for all heads.
  void accumulate_chunk(int64_t key, int64_t count, int64_t column,
                        const Real (*rescale)[kTileRows], RowPrefetcher& ahead) const {
    Chunk chunk;
    find_chunk(values_, key, count, chunk);
    for (int64_t head = 0; head < heads_; ++head) {
      int64_t offset = head * params_.v_stride_head * kv_bytes_;
      const char* const* rows = chunk.rows_for_head(offset, count);
      const Unit* p =
          reinterpret_cast<const Unit*>(of_head(first_.scratch.scores, head)) + column / Geo::kPair;
      Real* out = of_head(first_.scratch.out, head);
      for (int64_t dim = 0; dim < params_.head_dim_v; dim += Geo::kPanel) {
        accumulate_columns_rows<Arithmetic>(rows_, rows, offset + dim * kv_bytes_,
                                            count / Geo::kPair, rest_of_chain(key / Geo::kPair), p,
                                            stride_, rescale[head], out + dim, params_.head_dim_v,
                                            &ahead);
      }
    }
  }

  const FlashFwdParams& params_;
  const FwdPlan& plan_;
  const FwdJob& job_;
  const Tile first_;  // of the first head
  const int64_t heads_;
  const int rows_;
  const int64_t stride_;
  const int64_t kv_bytes_;  // of one element
  const attention::KeySet readable_;
  const KeyRows keys_, values_;  // of the first head
};

template <class Arithmetic>
void fwd_job(const FlashFwdParams& params, const FwdPlan& plan, const FwdJob& job) {
  using Tile = FwdTile<Arithmetic>;
  const int64_t heads = job.kv_head_end - job.kv_head_begin;
  const int64_t block_bytes = plan.packed_k_bytes + plan.packed_v_bytes;
  char* packed_here = job.scratch + heads * plan.tile_scratch_bytes;
  for (int64_t head = job.kv_head_begin; head < job.kv_head_end; ++head) {
    Tile(params, plan, job, head).load_q();
  }
  const int64_t rows = (job.q_end - job.q_begin) * (params.num_heads_q / params.num_heads_kv);
  const attention::KeySet readable =
      Tile(params, plan, job, job.kv_head_begin).mask.visible_keys(job.q_begin, job.q_end);
  const bool in_place =
      job.packed == nullptr && rows <= kTileRows && can_read_in_place<Arithmetic>(params);
  int64_t pieces_banked = 0;
  const auto bank_before = [&](int64_t idx) {
    if (idx == job.idx_begin ||
        Tile::piece(plan, job.blocks.block(idx)) == Tile::piece(plan, job.blocks.block(idx - 1)))
      return;
    for (int64_t head = job.kv_head_begin; head < job.kv_head_end; ++head) {
      Tile(params, plan, job, head).bank_piece(pieces_banked == 0);
    }
    ++pieces_banked;
  };
  if constexpr (kHasStripVec<typename Arithmetic::Real>) {
    if (in_place) {
      StripsInPlace<Arithmetic> strips(params, plan, job);
      for (int64_t idx = job.idx_begin; idx < job.idx_end; ++idx) {
        bank_before(idx);
        strips.attend_block(idx);
      }
    }
  }
  for (int64_t idx = job.idx_begin; idx < job.idx_end && !in_place; ++idx) {
    bank_before(idx);
    const int64_t block_idx = job.blocks.block(idx);
    const char* packed = packed_here;
    if (job.packed == nullptr) {
      pack_blocks<Arithmetic>(params, plan, job.batch_idx, job.kv_head_begin, job.kv_head_end,
                              block_idx, readable, packed_here);
    } else {
      packed = job.packed + job.packed_blocks.index(block_idx) * block_bytes;
    }
    for (int64_t head = job.kv_head_begin; head < job.kv_head_end; ++head, packed += block_bytes) {
      Tile(params, plan, job, head).attend_block(block_idx, packed);
    }
  }
  for (int64_t head = job.kv_head_begin; head < job.kv_head_end; ++head) {
    Tile tile(params, plan, job, head);
    if (pieces_banked > 0) tile.load_totals();
    if (job.partial != nullptr) {
      tile.store_partial(job.partial + (head - job.kv_head_begin) * job.partial_stride);
    } else {
      tile.finish();
    }
  }
}

template <class Arithmetic>
void combine_splits(const FlashFwdParams& params, const FwdPlan& plan, const FwdJob& job,
                    int64_t num_splits, int64_t split_stride) {
  FwdTile<Arithmetic> tile(params, plan, job, job.kv_head_begin);
  tile.clear_sums();
  for (int64_t split = 0; split < num_splits; ++split) {
    tile.merge_partial(job.partial + split * split_stride);
    tile.bank_piece(split == 0);
  }
  tile.load_totals();
  tile.finish();
}

}  // namespace sink_attention::cpu::SA_ISA
