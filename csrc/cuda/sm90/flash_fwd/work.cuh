// The pieces of work: a tile of rows of one sequence and kv head each.
//
// Thread blocks stay, as many as multiprocessors, and take a work of each round of as many works,
// every other round in reverse: who got a long one gets a short one next.
//
// The sequences' kv heads are cut into sections, one after the other, whose keys and values fit
// into L2. Of a section, all tiles of one rank, counted from the end of the longest sequence, come
// before those of the next: under a causal mask the longest first, so that the last ones to finish
// are short.
//
// What a warp must know of its work lies in shared memory, a copy for each warp, since warps are
// not all at the same work, and since accumulators leave no registers for it.
#pragma once

#include "attention/block_list.h"
#include "attention/mask.h"
#include "cuda/sm90/flash_fwd/problem.h"
#include "cuda/sm90/load_keys.cuh"
#include "cuda/tile/packed_rows.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

struct Work {
  int batch_idx;
  int kv_head;
  int row_begin;
  int num_rows;  // of the sequence and kv head; the tile has none where not above row_begin
  int seqlen_k;
  attention::BlockList<int> blocks;  // that some row of the tile sees
  // For the warp that copies:
  int q_batch;
  int q_row;  // of position 0
  int k_batch;
  int k_row;
  const int32_t* pages;  // the sequence's row of the block table, or null
  const char* k_base;    // as KeySource has them
  const char* v_base;
  int sink_end;  // keys [0, sink_end) and [key_begin, key_end) may be loaded
  int key_begin;
  int key_end;
  // For a warp that computes: blocks of keys that its warpgroup's rows all see whole.
  int full_begin;
  int full_end;
};

// The number of this block's work in a round.
SA_DEVICE int work_of_round(int round) {
  const int blocks = primitives::grid_dim().x;
  const int block = primitives::block_idx().x;
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// How a warp's description of its work is written: by lane 0, in steps, each of which reads again
// what the ones before it left, so that the warp that copies does with its few registers.
template <class Tiles>
struct WorkWriter {
  const FlashFwdKernelProblem& kernel_problem;
  Work& work;

  // Work number idx, for the rows [first_row, first_row + num_rows) of its tile. All lanes call.
  SA_DEVICE void write(int idx, int first_row, int num_rows) const {
    const bool writes = primitives::lane_idx() == 0;
    primitives::sync_warp();  // nobody reads the last work any more
    if (writes) write_place(idx);
    primitives::sync_warp();
    if (writes) write_blocks();
    primitives::sync_warp();
    if (load(work.blocks.end) == 0 && load(work.blocks.sink_end) == 0) return;
    if (writes) write_full(first_row, num_rows);
    primitives::sync_warp();
  }
  // Where the keys lie, for the warp that copies them. The work has blocks.
  SA_DEVICE void write_sources() const {
    const bool writes = primitives::lane_idx() == 0;
    if (writes) write_loaded();
    primitives::sync_warp();
    if (writes) store(work.k_base, source<false>().base);
    primitives::sync_warp();
    if (writes) {
      store(work.v_base, source<true>().base);
      store(work.pages, source<true>().pages);
    }
    primitives::sync_warp();
  }

 private:
  template <class T>
  static SA_DEVICE T load(const T& field) {
    return primitives::load_shared(&field);
  }
  template <class T>
  static SA_DEVICE void store(T& field, T value) {
    primitives::store_shared(&field, value);
  }

  SA_DEVICE void write_place(int idx) const {
    const attention::FlashFwdProblem& problem = kernel_problem.problem;
    const int num_heads = static_cast<int>(problem.num_heads_kv);
    const int all = kernel_problem.num_works / kernel_problem.num_tiles;
    const int section = idx / (kernel_problem.section * kernel_problem.num_tiles);
    const int first = section * kernel_problem.section;
    const int count = kernel_problem.section < all - first ? kernel_problem.section : all - first;
    const int in_section = idx - first * kernel_problem.num_tiles;
    const int rank = in_section / count;
    const int rest = first + in_section - rank * count;
    const int batch_idx = rest / num_heads;
    const attention::SeqlenInfo info = attention::seqlen_info(problem, batch_idx);
    store(work.batch_idx, batch_idx);
    store(work.kv_head, rest - batch_idx * num_heads);
    store(work.row_begin, (kernel_problem.num_tiles - 1 - rank) * Tiles::kBlockM);
    store(work.num_rows, static_cast<int>(info.seqlen_q) * kernel_problem.group);
    store(work.seqlen_k, static_cast<int>(info.seqlen_k));
    store(work.q_batch, static_cast<int>(info.q_batch));
    store(work.q_row, static_cast<int>(info.q_row));
    store(work.k_batch, static_cast<int>(info.k_batch));
    store(work.k_row, static_cast<int>(info.k_row));
  }

  SA_DEVICE attention::Mask mask() const {
    return attention::make_mask(kernel_problem.problem, load(work.num_rows) / kernel_problem.group,
                                load(work.seqlen_k));
  }
  // Positions of the sequence that rows of the tile have: a row, but at most the last one.
  SA_DEVICE int position(int row) const {
    const int packed_row = load(work.row_begin) + row;
    const int last = load(work.num_rows) - 1;
    return (packed_row < last ? packed_row : last) / kernel_problem.group;
  }
  SA_DEVICE attention::KeySet visible() const {
    return mask().visible_keys(position(0), position(Tiles::kBlockM - 1) + 1);
  }

  SA_DEVICE void write_blocks() const {
    attention::BlockList<int> blocks{0, 0, 0};
    if (load(work.row_begin) < load(work.num_rows)) {
      blocks = attention::blocks_of(visible(), Tiles::kBlockN);
    }
    store(work.blocks.sink_end, blocks.sink_end);
    store(work.blocks.begin, blocks.begin);
    store(work.blocks.end, blocks.end);
  }

  SA_DEVICE void write_full(int first_row, int num_rows) const {
    const attention::Range full =
        mask().keys_seen_by_all(position(first_row), position(first_row + num_rows - 1) + 1);
    store(work.full_begin, (static_cast<int>(full.begin) + Tiles::kBlockN - 1) / Tiles::kBlockN);
    store(work.full_end, static_cast<int>(attention::max_of(full.end, 0)) / Tiles::kBlockN);
  }

  // The keys that some query of the sequence sees. Those that only other tiles' rows see are there
  // too: boxes need not end where this tile's rows do.
  SA_DEVICE void write_loaded() const {
    const attention::KeySet keys =
        mask().visible_keys(0, load(work.num_rows) / kernel_problem.group);
    store(work.sink_end, static_cast<int>(keys.sink_end));
    store(work.key_begin, static_cast<int>(keys.window.begin));
    store(work.key_end, static_cast<int>(keys.window.end));
  }

  template <bool kValues>
  SA_DEVICE KeySource<kValues> source() const {
    attention::SeqlenInfo info{};
    info.k_batch = load(work.k_batch);
    info.k_row = load(work.k_row);
    return key_source<kValues>(kernel_problem.problem, load(work.batch_idx), load(work.kv_head),
                               info, {0, {0, 0}});
  }
};

SA_DEVICE attention::BlockList<int> blocks_of_work(const Work& work) {
  using primitives::load_shared;
  return {load_shared(&work.blocks.sink_end), load_shared(&work.blocks.begin),
          load_shared(&work.blocks.end)};
}

}  // namespace sink_attention::cuda::sm90
