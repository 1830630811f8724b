// A job of the forward: a tile of one kv head against keys packed ahead, or, in decode, a tile of
// several kv heads against keys that only this job reads.
//
// Several kv heads take turns at each block of keys because what counts in decode is to read the
// cache in the order in which it lies. In a cache [page][slot][head][dim] one head's rows are a
// small piece of each token's; read alone they keep a few of the memory's channels busy (8.5 of 21
// GB/s measured on a Zen 4 server). So all heads go over a panel of keys while the next panel's
// tokens are prefetched whole.
#pragma once

#include "cpu/simd/fwd_tile.h"
#include "cpu/simd/in_place.h"

namespace sink_attention::cpu::SA_ISA {

constexpr int64_t kMaxHeadsInPlace = 32;  // kv heads that attend_block_in_place takes at once

template <class Arithmetic>
FwdPlan plan_fwd(const FlashFwdProblem& problem) {
  return ForwardTile<Arithmetic>::make_plan(problem);
}

// Packs one block of keys for the kv heads [head_begin, head_end), one after the other into
// `packed`.
template <class Arithmetic>
void pack_blocks(const FlashFwdProblem& problem, const FwdPlan& plan, int64_t batch_idx,
                 int64_t head_begin, int64_t head_end, int64_t block_idx, Range readable,
                 char* packed) {
  using Unit = typename Arithmetic::Unit;
  using Geo = Geometry<Arithmetic>;
  const SeqlenInfo info = attention::seqlen_info(problem, batch_idx);
  const int64_t first = block_idx * plan.block_keys;
  const int64_t last = min_of(first + plan.block_keys, info.seqlen_k);
  const int64_t heads = head_end - head_begin;
  const int64_t head_stride = plan.packed_k_bytes + plan.packed_v_bytes;
  const KeyRows keys = attention::key_rows(problem, batch_idx, info, head_begin, readable);
  const KeyRows values = attention::value_rows(problem, batch_idx, info, head_begin, readable);
  for (int64_t key = first; key < last; key += Geo::kPanel) {
    if (key + Geo::kPanel <= readable.begin || key >= readable.end) continue;
    const int64_t end = min_of(key + Geo::kPanel, last);
    for (int64_t head = 0; head < heads; ++head) {
      prefetch_panel<Arithmetic>(keys, problem.k_stride_head, key + Geo::kPanel, head, heads);
      Unit* k = reinterpret_cast<Unit*>(packed + head * head_stride);
      pack_transposed<Arithmetic>(
          attention::key_rows(problem, batch_idx, info, head_begin + head, readable), key, end,
          k + (key - first) * Geo::units(problem.head_dim));
    }
    for (int64_t head = 0; head < heads; ++head) {
      prefetch_panel<Arithmetic>(values, problem.v_stride_head, key + Geo::kPanel, head, heads);
      Unit* v = reinterpret_cast<Unit*>(packed + head * head_stride + plan.packed_k_bytes);
      pack_rowwise<Arithmetic>(
          attention::value_rows(problem, batch_idx, info, head_begin + head, readable), key, end,
          plan.block_keys, v + (key - first) / Geo::kPair * Geo::kPanel);
    }
  }
}

// One strip of each kv head against a block of keys read where they lie (in_place.h), a panel of
// keys for all heads at a time, the next panel on its way: of K, then of V, then of the next
// block's K.
template <class Arithmetic>
void attend_block_in_place(const FlashFwdProblem& problem, const FwdPlan& plan, const FwdTask& task,
                           int64_t block_idx) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  using Tile = ForwardTile<Arithmetic>;
  using Geo = Geometry<Arithmetic>;
  constexpr int kStep = kLanes<Unit>;
  alignas(64) static const Unit zeros[kMaxHeadDim] = {};
  const int64_t heads = task.kv_head_end - task.kv_head_begin;
  const Tile first_tile(problem, plan, task, task.kv_head_begin);
  const int rows = static_cast<int>(first_tile.rows);
  const Range readable = first_tile.mask.visible_keys(task.q_begin, task.q_end);
  const int64_t first = block_idx * plan.block_keys;
  const auto [begin, end] = first_tile.seen_panels(first, 0, rows);
  if (begin >= end) return;
  const KeyRows keys =
      attention::key_rows(problem, task.batch_idx, first_tile.info, task.kv_head_begin, readable);
  const KeyRows values =
      attention::value_rows(problem, task.batch_idx, first_tile.info, task.kv_head_begin, readable);
  const int64_t key_head_bytes = problem.k_stride_head * attention::bytes_of(problem.kv_dtype);
  const int64_t value_head_bytes = problem.v_stride_head * attention::bytes_of(problem.kv_dtype);
  const int64_t stride = Tile::score_stride(plan);

  // Where a panel's rows of the first head lie, and from those the rows of the head `head_offset`
  // bytes on.
  const char* first_rows[Geo::kPanel];
  const Unit* panel[Geo::kPanel];
  const auto find_panel = [&](const KeyRows& source, int64_t key) {
    for (int i = 0; i < Geo::kPanel; ++i) {
      first_rows[i] =
          source.is_readable(key + i) ? static_cast<const char*>(source.row(key + i)) : nullptr;
    }
  };
  const auto turn_to_head = [&](int64_t head_offset) {
    for (int i = 0; i < Geo::kPanel; ++i) {
      panel[i] = first_rows[i] != nullptr
                     ? reinterpret_cast<const Unit*>(first_rows[i] + head_offset)
                     : zeros;
    }
  };

  for (int64_t key = first + begin; key < first + end; key += Geo::kPanel) {
    const bool is_last = key + Geo::kPanel >= first + end;
    find_panel(keys, key);
    for (int64_t head = 0; head < heads; ++head) {
      if (is_last) {
        prefetch_panel<Arithmetic>(values, problem.v_stride_head, first + begin, head, heads);
      } else {
        prefetch_panel<Arithmetic>(keys, problem.k_stride_head, key + Geo::kPanel, head, heads);
      }
      const Tile tile(problem, plan, task, task.kv_head_begin + head);
      turn_to_head(head * key_head_bytes);
      for (int half = 0; half < kTileVecs; ++half) {
        score_square_rows<Arithmetic>(rows, panel + half * kStep, Geo::units(problem.head_dim),
                                      tile.scratch.q, Tile::q_stride(problem),
                                      tile.scratch.scores + (key - first - begin) + half * kStep,
                                      stride);
      }
    }
  }
  Real rescale[kMaxHeadsInPlace][kTileRows];
  for (int64_t head = 0; head < heads; ++head) {
    Tile(problem, plan, task, task.kv_head_begin + head)
        .soften(first, 0, rows, begin, end, rescale[head]);
  }
  Real ones[kTileRows];
  for (Real& one : ones) one = 1;
  for (int64_t key = first + begin; key < first + end; key += Geo::kPanel) {
    const bool is_last = key + Geo::kPanel >= first + end;
    find_panel(values, key);
    for (int64_t head = 0; head < heads; ++head) {
      if (is_last) {
        prefetch_panel<Arithmetic>(keys, problem.k_stride_head, first + plan.block_keys, head,
                                   heads);
      } else {
        prefetch_panel<Arithmetic>(values, problem.v_stride_head, key + Geo::kPanel, head, heads);
      }
      const Tile tile(problem, plan, task, task.kv_head_begin + head);
      turn_to_head(head * value_head_bytes);
      const Unit* weights =
          reinterpret_cast<const Unit*>(tile.scratch.scores) + (key - first - begin) / Geo::kPair;
      for (int64_t column = 0; column < problem.head_dim_v; column += Geo::kPanel) {
        accumulate_columns_rows<Arithmetic>(rows, static_cast<const Unit* const*>(panel),
                                            int64_t{Geo::kPanel / Geo::kPair}, column, weights,
                                            stride, key == first + begin ? rescale[head] : ones,
                                            tile.scratch.out, problem.head_dim_v);
      }
    }
  }
}

template <class Arithmetic>
void fwd_tile(const FlashFwdProblem& problem, const FwdPlan& plan, const FwdTask& task) {
  const int64_t heads = task.kv_head_end - task.kv_head_begin;
  const int64_t block_bytes = plan.packed_k_bytes + plan.packed_v_bytes;
  char* packed_here = task.scratch + heads * plan.tile_scratch_bytes;
  for (int64_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
    ForwardTile<Arithmetic>(problem, plan, task, head).load_q();
  }
  const int64_t rows = (task.q_end - task.q_begin) * (problem.num_heads_q / problem.num_heads_kv);
  const Range readable = ForwardTile<Arithmetic>(problem, plan, task, task.kv_head_begin)
                             .mask.visible_keys(task.q_begin, task.q_end);
  const bool in_place = task.packed == nullptr && rows <= kTileRows &&
                        can_read_in_place<Arithmetic>(problem) && heads <= kMaxHeadsInPlace;
  for (int64_t block_idx = task.block_begin; block_idx < task.block_end; ++block_idx) {
    if (in_place) {
      attend_block_in_place<Arithmetic>(problem, plan, task, block_idx);
      continue;
    }
    const char* packed = task.packed + block_idx * block_bytes;
    if (task.packed == nullptr) {
      pack_blocks<Arithmetic>(problem, plan, task.batch_idx, task.kv_head_begin, task.kv_head_end,
                              block_idx, readable, packed_here);
      packed = packed_here;
    }
    for (int64_t head = task.kv_head_begin; head < task.kv_head_end;
         ++head, packed += block_bytes) {
      ForwardTile<Arithmetic>(problem, plan, task, head).attend_block(block_idx, packed);
    }
  }
  for (int64_t head = task.kv_head_begin; head < task.kv_head_end; ++head) {
    ForwardTile<Arithmetic> tile(problem, plan, task, head);
    if (task.partial != nullptr) {
      tile.leave_partial(task.partial + (head - task.kv_head_begin) * task.partial_stride);
    } else {
      tile.finish();
    }
  }
}

template <class Arithmetic>
void combine_splits(const FlashFwdProblem& problem, const FwdPlan& plan, const FwdTask& task,
                    int64_t num_splits, int64_t split_stride) {
  ForwardTile<Arithmetic> tile(problem, plan, task, task.kv_head_begin);
  tile.load_q();
  for (int64_t split = 0; split < num_splits; ++split)
    tile.merge_partial(task.partial + split * split_stride);
  tile.finish();
}

}  // namespace sink_attention::cpu::SA_ISA
