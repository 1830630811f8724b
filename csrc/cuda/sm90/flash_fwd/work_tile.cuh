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
// What the other warps must know of a work one of them writes ahead (scheduler.cuh), into a ring in
// shared memory: divisions and loads of lengths are done before anybody waits for them, and works
// without rows are not seen by the others. They read it there, since accumulators leave no
// registers for it.
#pragma once

#include "attention/block_list.h"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm90/ring.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

struct BlockRange {  // [begin, end), empty where end <= begin
  int begin;
  int end;
};

template <int kConsumers>
struct Work {
  int num_rows;   // of the sequence and kv head: seqlen_q * group. 0: no work is left
  int row_begin;  // of the tile, below num_rows
  int position;   // of the sequence, that row_begin belongs to
  int kv_head;
  int batch_idx;
  int seqlen_q;
  int seqlen_k;
  int q_batch;
  int q_row;                         // of position 0
  attention::BlockList<int> blocks;  // that some row of the tile sees; what follows is there only
                                     // if there are any
  BlockRange full[kConsumers];       // blocks that a warpgroup's rows all see whole
  // For the warp that copies:
  int k_batch;
  int k_row;
  const int32_t* pages;  // the sequence's row of the block table, or null
  const char* k_base;    // as KeySource has them
  const char* v_base;
  int sink_end;  // keys [0, sink_end) and [key_begin, key_end) may be loaded
  int key_begin;
  int key_end;
};

// Enough that nobody waits for one to be empty: the warp that copies is at most two or three works
// with keys ahead of those that compute, since it needs a buffer for each Q.
constexpr int kWorkSlots = 8;

// A work's number among those of its block, and so its slot.
struct WorkPlace {
  uint32_t number = 0;
  SA_DEVICE int slot() const { return static_cast<int>(number % kWorkSlots); }
  SA_DEVICE Ring<kWorkSlots>::Place in_ring() const {
    return {slot(), static_cast<int>(number / kWorkSlots % 2)};
  }
};

template <int kConsumers>
struct WorkQueue {
  Work<kConsumers> work[kWorkSlots];
  Ring<kWorkSlots> ring;

  // By one thread. readers: warps, each of which reads all works.
  SA_DEVICE void init(int readers) { ring.init(1, readers); }

  // A reader's warp waits for the work at `at`; whether there is one.
  SA_DEVICE bool wait_for(WorkPlace at) {
    ring.wait_until_full(at.in_ring());
    return primitives::load_shared(&work[at.slot()].num_rows) > 0;
  }
  // The warp has read all that it wants of it. All lanes call.
  SA_DEVICE void release(WorkPlace& at) {
    primitives::sync_warp();
    if (primitives::lane_idx() == 0) primitives::mbarrier_arrive(&ring.empty[at.slot()]);
    ++at.number;
  }
};

template <int kConsumers>
SA_DEVICE attention::BlockList<int> blocks_of_work(const Work<kConsumers>& work) {
  using primitives::load_shared;
  return {load_shared(&work.blocks.sink_end), load_shared(&work.blocks.begin),
          load_shared(&work.blocks.end)};
}

// The rows of its sequence and kv head, as far as offsets in q, out and lse go.
template <int kConsumers>
SA_DEVICE PackGqa rows_of_work(const Work<kConsumers>& work, int qhead_per_khead) {
  using primitives::load_shared;
  PackGqa rows{};
  rows.info.q_batch = load_shared(&work.q_batch);
  rows.info.q_row = load_shared(&work.q_row);
  rows.qhead_per_khead = qhead_per_khead;
  rows.kv_head = load_shared(&work.kv_head);
  rows.num_rows = load_shared(&work.num_rows);
  return rows;
}

}  // namespace sink_attention::cuda::sm90
